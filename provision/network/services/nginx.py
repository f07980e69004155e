"""nginx as a reverse proxy."""

from __future__ import annotations

import os
import pwd
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

from host.files import barred
from host.processes import runs_here
from inventory.errors import WrongState
from provision.network.daemons import command, in_turn, runs, stopped
from provision.network.document import Document
from provision.network.listeners import taken, unread, wait_until_read
from provision.network.service import ApplyStep, Checker, Inclusion, Question, Service, Unserved
from provision.network.templating import Unwritable, Word, backslashed
from repositories.places import directory

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError, Problem
    from inventory.fields import Address, ConfigPath, Lines, Port
    from inventory.model import Farm
    from inventory.places import Places
    from inventory.repositories import PackageRepository
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")
_LONG = 40
"""Longer names don't fit nginx's hash of names as it is by itself. A pattern isn't in it: a directive
for a larger one would be refused where the admin has it too."""
_USER = re.compile(r"^\s*user\s+([^\s;]+)(?:\s+([^\s;]+))?\s*;", re.MULTILINE)
_DEBIANS = "www-data"
_LISTEN = re.compile(r"^\s*listen (\d+)\b", re.MULTILINE)


def _ports(files: Sequence[FileChange]) -> tuple[int, ...]:
    """Where it is to listen."""
    found = (port for change in files for port in _LISTEN.findall(change.after or ""))
    return tuple(map(int, dict.fromkeys(found)))


def _string(text: str) -> Word:
    if "$" in text:
        raise Unwritable("nginx has no way to write '$' itself: it begins a variable")
    return backslashed(text)


@dataclass(frozen=True, slots=True)
class RepositoryRow:
    """A package repository, for the template. ``path``: of its URL; ``top``: its directory; both end in
    a slash. ``inside``: from where on nginx looks whose links are. ``immutable``: the pattern of what
    never changes, and ``found``: the file that such a path leads to."""

    name: Word
    path: Word
    top: Word
    inside: Word
    immutable: Word
    found: Word


@dataclass(frozen=True, slots=True)
class RepositoryHost:
    """A virtual host with repositories alone. ``certificate``, ``key``: "" without TLS."""

    name: Word
    port: int
    certificate: Word
    key: Word
    rows: tuple[RepositoryRow, ...]


@dataclass(frozen=True, kw_only=True)
class Nginx(Service):
    """nginx: the VMs' `proxy` names as virtual hosts, and package repositories."""

    NAME: ClassVar = "nginx"
    TOOLS: ClassVar = {"nginx": "nginx-light"}
    STRINGS: ClassVar = {"nginx": _string}
    DROP_INS: ClassVar = ("config",)
    SERVES_REPOSITORIES: ClassVar = True

    config: ConfigPath = "/etc/nginx/sites-enabled/farmhand"
    """The file, one that nginx.conf includes within http."""
    main: ConfigPath = "/etc/nginx/nginx.conf"
    """The server's own configuration, which the check begins with."""
    logs: ConfigPath = "/var/log/nginx"
    """The directory of the access logs, NAME.access.log each."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 80
    """The port of plain HTTP."""
    tls_port: Port = 443
    """The port of names with a certificate."""
    reload: Lines = ("systemctl", "reload", "nginx")
    """The command that makes it read its files."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "nginx")
    """The command that succeeds while it runs."""

    @property
    def ports(self) -> tuple[str, ...]:
        return "port", "tls_port"

    def documents(self, r: Renderer) -> Iterator[Document]:
        upgrade = Word(f"farmhand_{crc32(r.farm.farm.encode()):08x}_upgrade")  # short, for its hash
        hosts = tuple(self._repository_hosts(r.farm))
        text = r.render(
            "nginx", self, long=_LONG, pattern=_pattern, upgrade=upgrade, repositories=hosts
        )  # fmt: skip
        yield Document(self.NAME, self.config, text)

    def _repository_hosts(self, farm: Farm) -> Iterator[RepositoryHost]:
        found: dict[tuple[str, int], RepositoryHost] = {}
        for name, section in _served(farm):
            at = section.served
            port = at.port or (self.tls_port if at.tls else self.port)
            certificate, key = section.certificate or "", section.key or section.certificate or ""
            row = _row(name, at.path, str(directory(farm, name)))
            known = found.get((at.host, port))
            rows = (*known.rows, row) if known else (row,)
            host = RepositoryHost(Word(at.host), port, Word(certificate), Word(key), rows)
            found[at.host, port] = host
        yield from found.values()

    def problems(self, farm: Farm, places: Places) -> Iterator[Problem]:
        """A name is a VM's or the repositories', and each of these has its own path there."""
        proxies = {proxy.name.lower() for vm in farm.vms.values() for proxy in vm.proxy}
        taken: dict[object, str] = {}
        hosts: dict[object, tuple[str, str | None]] = {}
        for name, section in _served(farm):
            at, place = section.served, ("repositories", name, "url")
            if at.host in proxies:
                yield places.problem(place, f"{at.host} is the proxy name of a VM")
            first = taken.setdefault(at, name)
            if first != name:
                yield places.problem(place, f"repository {first} is served there")
            listens = at.host, at.port or at.tls
            who, certificate = hosts.setdefault(listens, (name, section.certificate))
            if certificate != section.certificate:
                yield places.problem(place, f"repository {who} has another certificate for {at.host}")

    def checkers(self, farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        proxies = (proxy for vm in farm.vms.values() for proxy in vm.proxy)
        logs = {str(Path(proxy.access_log).parent) for proxy in proxies if proxy.access_log}
        shadow = (self.logs, "/run", *sorted(logs))
        yield Checker(("nginx", "-t", "-q", "-c", self.main), shadow)

    def inclusion(self) -> Inclusion:
        checker = Checker(("nginx", "-t", "-q", "-c", self.main), (self.logs, "/run"))
        remedy = f"within http {{ }} of {self.main}: include {self.config};"
        return Inclusion(self.config, self.main, checker, remedy)

    def missing(
        self, farm: Farm, files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        yield from self._barred(farm)
        down = tuple(stopped(runner, self.NAME, self.alive, self.reload))
        yield from down
        for port in _ports(files) if down or runs_here(self.NAME) else ():
            yield from taken(runner, self.NAME, "tcp", port, own=(self.NAME,))

    def _barred(self, farm: Farm) -> Iterator[FarmhandError]:
        """Of each repository, the directory on the way to it that keeps nginx out."""
        served = tuple(_served(farm))
        account = _account(self.main) if served else None
        if account is None:
            return
        groups = os.getgrouplist(account.pw_name, account.pw_gid)
        for name, _ in served:
            top = directory(farm, name)
            if place := barred(top, account.pw_uid, groups):
                yield WrongState(
                    f"nginx: its user {account.pw_name} may not pass through {place} "
                    f"to repository {name}",
                    remedy=f"chmod o+x {shlex.quote(str(place))}, or give the repository another 'path'",
                )

    def unserved(self, _farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        if (why := unread(runner, self.NAME, _ports(files), [c.path for c in files])) is not None:
            yield Unserved(why, self._reload(files))

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs_here(self.NAME) or runs(runner, self.alive)

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        yield self._reload(changes)

    def _reload(self, files: Sequence[FileChange]) -> ApplyStep:
        """It goes on with its old configuration where it can't take the new one, and says nothing."""
        told = command(self.NAME, self.reload, self.alive)
        paths = [change.path for change in files if change.after is not None]
        seen = partial(wait_until_read, program=self.NAME, ports=_ports(files), paths=paths)
        return replace(told, run=in_turn(told.run, seen))

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        server = (str(self.address), self.port, self.tls_port)
        yield from questions.proxies(self.NAME, server, farm, view, rows)

    def not_live(self) -> Iterator[str]:
        yield "reloaded for each change; connections go on"


def _served(farm: Farm) -> Iterator[tuple[str, PackageRepository]]:
    return ((name, one) for name, one in farm.repositories.items() if one.serve == Nginx.NAME)


def _row(name: str, path: str, top: str) -> RepositoryRow:
    """A channel's packages are those of the pool, under one name more."""
    below = "(?:channels/[^/]+/(?=pool/))?((?:pool|generations)/.+)"
    slashed = _string(f"{top}/")
    return RepositoryRow(
        name=Word(name),
        path=Word(f"{path}/"),
        top=slashed,
        inside=_string(f"from={top}"),
        immutable=Word(f'"^{re.escape(path)}/{below}$"'),
        found=Word(f'{slashed[:-1]}$1"'),
    )


def _account(main: str) -> pwd.struct_passwd | None:
    """Whom nginx's workers run as. None: nobody knows, or nginx as whoever starts it."""
    try:
        match = _USER.search(Path(main).read_text(encoding="utf-8", errors="replace"))
        return pwd.getpwnam(match[1] if match else _DEBIANS)
    except (OSError, KeyError):
        return None


def _pattern(name: str) -> Word:
    """A server_name that is the name alone."""
    return Word('"~^' + name.replace(".", r"\.") + '$"')
