"""VMs that run on from a kept memory, and have not been brought to the present: nobody waited for that
start, or it was killed. A file of its name says so of each, from before its start until somebody has
logged in and told it (``provision.guest.resume``); one too many costs no more than telling it again."""

from __future__ import annotations

from pathlib import Path

from host.files import file_error, make_directory, open_new, remove
from host.paths import FarmPaths
from provision.member import Member


def note(member: Member) -> None:
    """It is about to run on. Errors: NoSpace, WrongState."""
    file = _file(member)
    try:
        make_directory(file.parent, mode=0o700)
        open_new(file, mode=0o600).close()
    except OSError as error:
        raise file_error(error, file, "write") from error


def is_untold(member: Member) -> bool:
    return _file(member).exists()


def forget(member: Member) -> None:
    """It was told, or boots."""
    remove(_file(member))


def forget_name(paths: FarmPaths, vm: str) -> None:
    """No VM has that name any more."""
    remove(paths.untold / vm)


def _file(member: Member) -> Path:
    return member.site.paths.untold / member.vm
