"""A zone's file, or lines of one, as RFC 1035 section 5 and BIND have it: dnspython reads it, and each
record keeps its line."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tokenizer
import dns.zonefile

from provision.network.sources import MAX_BYTES, SourceLine, Sources, one_line

MAX_RECORDS = 65536
_DEFAULT_TTL = 3600  # where neither $TTL nor SOA nor another record says one
_SERVER_DIRECTORY = Path("/var/cache/bind")
"""Debian's named is there (`directory` in named.conf.options): its relative names begin there."""
_INCLUDE = re.compile(r"^\$INCLUDE(?![^\s\"();])[^\n]*", re.MULTILINE | re.IGNORECASE)
_Written = Literal["named", "unnamed", "generated"]


@dataclass(frozen=True, slots=True)
class ZoneRecord:
    """Names are in full, in lower case, without the last dot. ``value``: what follows the type, as
    dnspython writes it. ``ttl``: in seconds. ``written``: "unnamed" has its name from the record before
    it, "generated" is one of a $GENERATE line's."""

    name: str
    ttl: int
    kind: str
    value: str
    line: SourceLine
    written: _Written


class ZoneNames:
    """``addresses``: A records by name. ``names``: A records by address. ``aliases``: CNAME records by
    the name that they lead to."""

    def __init__(self, origin: str, records: Sequence[ZoneRecord]) -> None:
        self.origin = origin
        self.records = records
        self.addresses: dict[str, list[ZoneRecord]] = defaultdict(list)
        self.names: dict[str, list[ZoneRecord]] = defaultdict(list)
        self.aliases: dict[str, list[ZoneRecord]] = defaultdict(list)
        self._targets = {record.name: record.value for record in records if record.kind == "CNAME"}
        for record in records:
            if record.kind == "A":
                self.addresses[record.name].append(record)
                self.names[record.value].append(record)
            elif record.kind == "CNAME":
                self.aliases[self._canonical(record.name)].append(record)

    def has(self, name: str) -> bool:
        """Whether it is inside of the zone."""
        return name == self.origin or name.endswith(f".{self.origin}")

    def find(self, word: str) -> str:
        """The name that has the addresses of a name in full, or in the zone; "" if none is known."""
        for name in (word, f"{word}.{self.origin}"):
            if (found := self._canonical(name)) in self.addresses:
                return found
        return ""

    def leads(self, name: str) -> bool:
        """Whether the name in full has addresses, or is another name's."""
        return name in self.addresses or name in self._targets

    def _canonical(self, name: str) -> str:
        """Where its CNAME records lead, as far as a resolver follows (BIND: 11 of them)."""
        for _ in range(11):
            name = self._targets.get(name, name)
        return name


def read_zone(sources: Sources, path: Path, origin: str) -> list[ZoneRecord]:
    """In the file's order, of names in and outside of the zone ``origin`` alike. InventoryError, and as
    ``Sources.text``."""
    reader = _ZoneReader(sources, path.parent, origin)
    reader.read(path)
    return reader.records


class _NoIdna(dns.name.IDNACodec):
    """BIND takes bytes as they are; dnspython would make another name of them."""

    def __init__(self) -> None:  # its base's has no types
        pass

    def encode(self, label: str) -> bytes:
        if not label.isascii():
            raise ValueError(f"{label!r} is not ASCII: write it as xn--... (IDNA)")
        return label.encode()


class _Tokenizer(dns.tokenizer.Tokenizer):
    """``begun``: the line in which the record begins that is being read, and how it is ``written``."""

    begun = 1
    written: _Written = "named"

    def get(self, want_leading: bool = False, want_comment: bool = False) -> dns.tokenizer.Token:
        if not want_comment:
            return super().get(want_leading)
        self.begun = self.line_number  # so the reader asks at the beginning of a record alone
        token = super().get(want_leading, want_comment)
        generated = token.is_identifier() and token.value.startswith("$")  # no other makes a record
        self.written = "unnamed" if token.is_whitespace() else "generated" if generated else "named"
        return token


class _RecordTaker(dns.zonefile.RRsetsReaderTransaction):
    """Where dnspython's reader puts a record: straight to us, however many a name has."""

    def __init__(self, owner: _ZoneReader) -> None:
        manager = dns.zonefile.RRSetsReaderManager(dns.name.root)
        super().__init__(manager, True, False)  # type: ignore[no-untyped-call]
        self._owner = owner

    def add(self, *args: Any) -> None:
        self._owner.take(*args)


class _ZoneReader:
    def __init__(self, sources: Sources, directory: Path, origin: str) -> None:
        self.records: list[ZoneRecord] = []
        self._sources = sources
        self._directories = directory, _SERVER_DIRECTORY
        self._path = directory
        self._room = MAX_BYTES
        self._codec = _NoIdna()
        self._tokenizer = self._tokens("")
        self._reader = dns.zonefile.Reader(
            self._tokenizer,
            dns.rdataclass.IN,
            _RecordTaker(self),
            allow_directives=("$GENERATE", "$ORIGIN", "$TTL"),
        )
        # Its zone is the root, so that it drops nothing. An own TTL, or the SOA's, goes before ours.
        self._reader.current_origin = self._owner = dns.name.from_text(origin)
        self._reader.default_ttl = _DEFAULT_TTL
        self._reader.default_ttl_known = self._reader.default_ttl_from_soa = True

    def read(self, path: Path, by: SourceLine | None = None) -> None:
        with self._sources.text(path, by) as text:
            at, line = 0, 1
            for match in _INCLUDE.finditer(text):
                self._part(path, line, text[at : match.start()])
                line += text.count("\n", at, match.start())
                self._include(SourceLine(path, line), match[0])
                at = match.end()
            self._part(path, line, text[at:])

    def _tokens(self, text: str) -> _Tokenizer:
        return _Tokenizer(text, idna_codec=self._codec)

    def _part(self, path: Path, line: int, text: str) -> None:
        """The reader goes on with its origin, owner and TTL."""
        self._path = path
        self._reader.tok = self._tokenizer = self._tokens(text)
        self._tokenizer.line_number = line
        try:
            self._reader.read()
        except (dns.exception.DNSException, ValueError) as error:
            words = str(error).removeprefix("{}:{}: ".format(*self._tokenizer.where()))
            record = one_line(text.split("\n")[self._tokenizer.begun - line], 80)
            raise self._here.wrong(f"not a zone: {record!r}: {words}") from error

    def _include(self, here: SourceLine, text: str) -> None:
        """RFC 1035 section 5.1: origin and owner are as they were, afterwards."""
        reader, tokens = self._reader, self._tokens(text)
        before = reader.current_origin, self._owner
        try:
            _, name, origin = (tokens.get().unescape() for _ in range(3))
            if name.is_eol_or_eof():
                raise ValueError("which file?")
            if not origin.is_eol_or_eof():
                reader.current_origin = tokens.as_name(origin, before[0])
                tokens.get_eol()
        except (dns.exception.DNSException, ValueError) as error:
            raise here.wrong(f"not an $INCLUDE: {error}") from error
        if found := self._sources.included(name.value, here, *self._directories):
            self.read(found, here)
        reader.current_origin, self._owner = before

    @property
    def _here(self) -> SourceLine:
        return SourceLine(self._path, self._tokenizer.begun)

    def take(self, name: dns.name.Name, ttl: int, rdata: dns.rdata.Rdata) -> None:
        value = rdata.to_text()
        self._room -= len(value)
        if len(self.records) == MAX_RECORDS or self._room < 0:
            raise self._here.wrong(
                f"with this there are more than {MAX_RECORDS} records, or {MAX_BYTES >> 20} MiB of them"
            )
        kind = dns.rdatatype.to_text(rdata.rdtype)
        if kind == "CNAME":
            value = _plain(rdata.target)  # type: ignore[attr-defined]
        elif kind == "SOA" and self._reader.default_ttl_from_soa:
            self._reader.default_ttl = rdata.minimum  # type: ignore[attr-defined]
        written = self._tokenizer.written
        if written == "unnamed":
            name = self._owner  # the reader would take $GENERATE's last, and BIND doesn't
        elif written == "named":
            self._owner = name
        self.records.append(ZoneRecord(_plain(name), ttl, kind, value, self._here, written))


def _plain(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower()
