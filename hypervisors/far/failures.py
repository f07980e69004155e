"""What to do, and on which machine, about what went wrong on another one or on the way there."""

from __future__ import annotations

from host.hints import hint
from host.printable import last_line
from inventory.errors import (
    Busy,
    CommandFailed,
    DriverFailed,
    FarmhandError,
    NoSpace,
    TimedOut,
    WrongState,
)

_ITS_OWN = (Busy, CommandFailed, DriverFailed, NoSpace, TimedOut, WrongState)
"""Of a machine, not of what was asked: what their remedies say is done there."""

_NO_AGENT = (
    (
        r"No module named '?libvirt",
        "on {machine}, as root: apt-get install -y --no-install-recommends python3-libvirt",
    ),
    (
        r"python3: (command )?not found|python3: No such file",
        "on {machine}, as root: apt-get install -y --no-install-recommends python3 python3-libvirt",
    ),
    (r"farmhand needs Python", "on {machine}: a newer system, such as Debian 12"),
    (
        r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED",
        "log in once by hand, and compare the host key that it asks about: {login}",
    ),
    (
        r"Permission denied \(|Too many authentication failures",
        "log in with a key that asks nothing (ssh-agent keeps its passphrase); this must work: "
        "{login} true",
    ),
    (
        r"Could not resolve|Connection (refused|timed out|closed|reset)|No route|unreachable",
        "see that {machine} is up and that its sshd answers: {login} true",
    ),
    (
        r"No space left on device|Disk quota exceeded|Read-only file system|Cannot allocate memory",
        "put that right on {machine}",
    ),
)


def no_agent(machine: str, login: str, said: str) -> DriverFailed:
    """The error for a connection on which no agent ever spoke. ``login``: ssh, as typed. ``said``: by
    ssh, by the login, or by Python there; the last line tells."""
    last = last_line(said, 200)
    remedy = hint(said, _NO_AGENT, machine=machine, login=login).remedy
    return DriverFailed(
        f"no farmhand agent on {machine}: {last or 'the connection ended'}",
        remedy=remedy
        or f"""this must work, asking nothing: {login} python3 -c "'import libvirt'" """
        "(Python 3.11 or later; Debian's python3-libvirt)",
    )


def on(machine: str, error: FarmhandError, *, there: bool = False) -> FarmhandError:
    """An error of that machine's, for somebody at another: it names the machine, and so does a remedy
    that is for it (``there``: any is). Tasks of farmhand are done here."""
    remedy = error.remedy
    if isinstance(remedy, str) and remedy and (there or isinstance(error, _ITS_OWN)):
        remedy = f"on {machine}: {remedy}"
    what = f"{machine}: {error.what}"
    FarmhandError.__init__(error, what, vm=error.vm, remedy=remedy, detail=error.detail)
    return error
