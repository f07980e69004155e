"""Proof of signatures by gpgv(1): who signed, and what exactly."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host.files import file_error
from host.printable import last_line
from host.run import CommandResult, Runner
from inventory.errors import Unfit
from repositories.signing.armour import PUBLIC_KEY, is_clear_signed, plain

TOOLS = {"gpgv": "gpgv"}
"""Commands that it runs, each with its Debian package."""

_LIMIT = 60  # seconds
_ARMOUR = b"-----BEGIN PGP"


@dataclass(frozen=True, slots=True)
class ProvenText:
    """Of a text whose signatures are good. ``text``: what they are of; nothing else that was beside it
    may be believed. ``signers``: fingerprints of primary keys. ``expired``: those whose time is over
    now: clients refuse what only they signed."""

    text: bytes
    signers: tuple[str, ...]
    expired: tuple[str, ...] = ()


def prove_detached(data: bytes, signature: bytes, keys: bytes, runner: Runner) -> ProvenText:
    """That a detached signature, armoured or not, is of ``data``, by one of the public ``keys``,
    armoured or not. Unfit says why it isn't."""
    return _prove({"signature": signature, "data": data}, keys, runner)


def prove_clear(text: bytes, keys: bytes, runner: Runner) -> ProvenText:
    """As ``prove_detached``, of a text with its signature in it (RFC 9580, 7), and nothing around."""
    if not is_clear_signed(text):
        raise Unfit("it is not signed")
    return _prove({"signed": text}, keys, runner)


def _prove(files: dict[str, bytes], keys: bytes, runner: Runner) -> ProvenText:
    if keys.lstrip().startswith(_ARMOUR):
        keys = plain(PUBLIC_KEY, keys)
    output = ""
    try:
        with tempfile.TemporaryDirectory(prefix="farmhand-") as place:
            for name, data in {**files, "keyring": keys}.items():
                Path(place, name).write_bytes(data)
            output = f"{place}/text"
            result = runner.read(
                "gpgv", "--homedir", place, "--keyring", f"{place}/keyring", "--weak-digest", "SHA1",
                "--status-fd", "1", *(("--output", output) if "signed" in files else ()),
                *(f"{place}/{name}" for name in files), timeout=_LIMIT, ok=range(256),
            )  # fmt: skip
            signers, expired = _judged(result)
            text = files["data"] if "data" in files else Path(output).read_bytes()
    except OSError as error:
        raise file_error(
            error, Path(tempfile.gettempdir(), "farmhand"), "prove a signature in"
        ) from error
    return ProvenText(text, signers, expired)


def _judged(result: CommandResult) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who signed; and whose time is over. Unfit: nobody did."""
    signers, expired, why = [], [], ""
    for verdict, signer in _verdicts(result.stdout):
        match verdict:
            case "GOODSIG":
                signers.append(signer)
            case "EXPKEYSIG":
                expired.append(signer)
            case "BADSIG":
                raise Unfit("it was changed after it was signed")
            case "REVKEYSIG":
                why = f"it is signed by {signer}, which was revoked"
            case "ERRSIG":
                why = why or f"it is signed by {signer}, which is none of the keys"
            case _:
                why = why or f"its signature by {signer} is over"
    if not signers and not expired:
        said = last_line(result.stderr, 200).removeprefix("gpgv: ") or "gpgv says nothing"
        raise Unfit(why or f"it is not signed: {said}")
    return tuple(signers), tuple(expired)


_VERDICTS = ("GOODSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "BADSIG", "ERRSIG")


def _verdicts(status: str) -> Iterator[tuple[str, str]]:
    """Of each signature, its verdict and its signer, by gpgv's status lines (GnuPG's doc/DETAILS). Only
    what VALIDSIG follows is of a fingerprint, and right as such."""
    last = ""
    for line in status.splitlines():
        match line.split()[1:]:
            case [("BADSIG" | "ERRSIG") as verdict, key, *_]:
                yield verdict, key
            case [verdict, *_] if verdict in _VERDICTS:
                last = verdict
            case ["VALIDSIG", key, *rest]:
                yield last, rest[-1] if len(rest) >= 9 else key
