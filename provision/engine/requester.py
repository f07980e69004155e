"""Who asked for an operation."""

from __future__ import annotations

import os
import pwd
from dataclasses import asdict, dataclass
from pathlib import Path

from host.processes import account

_LOGIN_UID = Path("/proc/self/loginuid")
_UNSET = 2**32 - 1  # (uid_t) -1: nobody logged in, as in a container or a service


@dataclass(frozen=True, slots=True, kw_only=True)
class Requester:
    """Made once, by the face that was asked, and carried by the ``Site``.

    ``login`` is who logged in, where that is another than ``user``: by sudo(8) or su(1). ``tty`` is the
    terminal, such as pts/3. ``token`` is the name of an access token, never the token itself; then
    there is no user of this machine. "" and None: not known, or none."""

    user: str = ""
    uid: int | None = None
    login: str = ""
    tty: str = ""
    token: str = ""

    def __str__(self) -> str:
        who = f"token {self.token}" if self.token else self.user or "somebody"
        who = f"{self.login} as {who}" if self.login else who
        return f"{who} ({self.tty})" if self.tty else who

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of_process(cls) -> Requester:
        """Of this process, by what the kernel says; of the environment only what the kernel confirms."""
        uid = os.getuid()
        login = _login_uid()
        other = _login_name(login) if login is not None and login != uid else ""
        return cls(user=account(uid), uid=uid, login=other, tty=_terminal())


NOBODY = Requester()
"""Where nobody asks, or nobody knows."""


def _login_uid() -> int | None:
    """The uid of who logged in (proc(5), /proc/PID/loginuid): set by PAM at login, kept by sudo and su,
    and not to be changed by an ordinary user."""
    try:
        found = int(_LOGIN_UID.read_text(encoding="ascii"))
    except (OSError, ValueError):  # a kernel without audit
        return None
    return None if found == _UNSET else found


def _login_name(uid: int) -> str:
    """The name that sudo was called under, where its uid is that one: several names may share a uid."""
    told = os.environ.get("SUDO_USER", "")
    try:
        if told and pwd.getpwnam(told).pw_uid == uid:
            return told
    except (KeyError, ValueError):
        pass
    return account(uid)


def _terminal() -> str:
    for stream in (0, 1, 2):
        try:
            return os.ttyname(stream).removeprefix("/dev/")
        except OSError:
            continue
    return ""
