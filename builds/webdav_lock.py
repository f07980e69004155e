"""A lock that several machines share, on a WebDAV server (RFC 4918).

It is a LOCK of a file that is there for nothing else. Who holds it stands in the lock's owner, which
some servers show to others, and in the file, which all do. It is refreshed at a third of the time that
the server granted, by a thread. It is lost for good as soon as the server says so, or when that time is
over without an answer; until then there may be trouble. Servers differ: what one doesn't show is asked
for in another way, and none is trusted to have done what it answers (nginx makes a new lock where an old
one is to be refreshed).

Time is measured as this machine counts it, suspended or not; nobody compares clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from xml.sax.saxutils import escape

from builds.dav import ActiveLock, Dav, DavAnswer, active_locks, refused
from host.documents import json_object, made
from host.printable import as_json, one_line
from inventory.errors import (
    Busy,
    Call,
    ConnectionLost,
    FarmhandError,
    LeaseLost,
    Unsupported,
    WrongState,
)
from inventory.sizes import format_duration

_XML = "application/xml; charset=utf-8"
_LOCK = (
    '<?xml version="1.0" encoding="utf-8"?>\n<D:lockinfo xmlns:D="DAV:">'
    "<D:lockscope><D:exclusive/></D:lockscope><D:locktype><D:write/></D:locktype>"
    "<D:owner>{}</D:owner></D:lockinfo>\n"
)
_DISCOVER = (
    '<?xml version="1.0" encoding="utf-8"?>\n<D:propfind xmlns:D="DAV:">'
    "<D:prop><D:lockdiscovery/></D:prop></D:propfind>\n"
)
_GONE = (400, 404, 409, 410, 412, 423)
"""Answers to a refresh that say that there is no such lock any more."""
_SHORTEST = 1.0  # seconds of a lock that can be kept


def _now() -> float:
    """Seconds that go on while the machine is suspended: a notebook may hold the lock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """Who holds it, in the words of who does. ``mark``: of this holding alone; it is no secret.
    ``since``: ISO 8601, by the holder's clock. ``build``: "" before there is one."""

    mark: str
    who: str
    host: str
    pid: int
    farm: str
    since: str
    build: str = ""

    def __str__(self) -> str:
        build = f", build {self.build}" if self.build else ""
        said = f"{self.who} on {self.host}: pid {self.pid}, farm {self.farm}{build}, since {self.since}"
        return one_line(said, 400)

    @property
    def owner(self) -> str:
        """As the lock has it."""
        return f"farmhand: {self}, mark {self.mark}"


@dataclass(frozen=True, slots=True)
class SharedLock:
    """What a look at the lock shows. ``held`` and what follows it: by the server. ``file``: whose note
    the file is, be it left behind; None: there is none. ``foreign``: the file is somebody's document.
    ``age``: seconds since the file was written."""

    url: str
    held: bool = False
    owner: str = ""
    token: str = ""
    left: float | None = None
    file: LockHolder | None = None
    foreign: bool = False
    age: float | None = None

    @property
    def holder(self) -> LockHolder | None:
        """Who holds it, where the file tells: it may be left from another than the lock's owner."""
        known = self.held and self.file is not None and (not self.owner or self.file.mark in self.owner)
        return self.file if known else None

    def __str__(self) -> str:
        if not self.held:
            if self.foreign:
                return f"nobody holds {self.url}, a file that is not farmhand's"
            left = f"; its file was left behind by {self.file}{self._aged()}" if self.file else ""
            return f"nobody holds {self.url}{left}"
        who = f"{self.holder}{self._aged()}" if self.holder else self.owner or "somebody it doesn't name"
        ends = f"; unless refreshed it ends in {format_duration(self.left)}" if self.left else ""
        return f"{self.url} is held by {who}{ends}"

    def _aged(self) -> str:
        if self.age is None:
            return ""
        return f" ({format_duration(self.age)} ago by the server's clock)"


def look(dav: Dav) -> SharedLock:
    """Who holds it now. FarmhandError."""
    answer = dav.ask("PROPFIND", _DISCOVER, Depth="0", Content_Type=_XML)
    if not answer.good and answer.status != 404:
        raise refused(dav.url, "a look at it", answer)
    locks = active_locks(answer.body) if answer.good else []
    seen = locks[0] if locks else ActiveLock("", "", None)
    file, foreign, age = _file(dav) if answer.good else (None, False, None)
    return SharedLock(dav.url, bool(locks), seen.owner, seen.token, seen.left, file, foreign, age)


def _file(dav: Dav) -> tuple[LockHolder | None, bool, float | None]:
    """Whose note the file is, whether it is somebody's document, seconds since it was written."""
    try:
        answer = dav.ask("GET")
    except ConnectionLost:  # such as one that is too large for a note
        return None, True, None
    if answer.status == 404 or not answer.body:
        return None, False, None
    try:
        holder = made(LockHolder, json_object(answer.body))
    except ValueError:
        return None, True, None
    return holder, False, answer.seconds_since_change()


def break_lock(dav: Dav, seen: SharedLock) -> None:
    """End the lock that was seen, whoever holds it. FarmhandError, where the server doesn't let us."""
    by_hand = "have its holder end it, or the server's admin; else it ends by itself"
    if not seen.token:
        raise Unsupported(f"{seen}; its server shows no lock token to end it by", remedy=by_hand)
    answer = dav.ask("UNLOCK", Lock_Token=f"<{seen.token}>")
    if not answer.good:
        error = refused(dav.url, "to end the lock", answer)
        error.remedy = f"its server may want the login that took it; {by_hand}"
        raise error
    if (now := look(dav)).held and now.token == seen.token:
        raise WrongState(f"{dav.url}: its server said that the lock was ended, and has it still",
                         remedy=by_hand)  # fmt: skip


class RemoteLock:
    """The lock, held by us. ``timeout``: seconds to ask for. ``took``: told the token, before anything
    else is done with the lock.

    Its methods may be called by any thread."""

    def __init__(
        self,
        dav: Dav,
        holder: LockHolder,
        timeout: float,
        took: Callable[[str], object] = lambda _token: None,
    ) -> None:
        self.url = dav.url
        self._dav = dav
        self._holder = holder
        self._asked = timeout
        self._watchers: list[Callable[[str], object]] = []
        self._took = took
        self._guard = threading.RLock()  # of the connection, and of what follows
        self._token = ""
        self._granted = timeout
        self._until = 0.0
        self._why_lost = ""
        self._end = threading.Event()
        self._keeper: threading.Thread | None = None

    # -- taking it ----------------------------------------------------------------------------

    def take(self) -> SharedLock:
        """Take it, and begin to keep it. Returns what was there before: a dead one's file. Errors: Busy
        (somebody has it), Unsupported (the server has no locks), and others of FarmhandError. Then
        nothing is held."""
        with self._guard:
            self._check_class()
            try:
                self._lock()
                before = self._write_first()
            except BaseException:
                self._drop()
                raise
        self._keeper = threading.Thread(target=self._keep, name="shared lock", daemon=True)
        self._keeper.start()
        return before

    def _check_class(self) -> None:
        answer = self._dav.ask("OPTIONS")
        if answer.status in (404, 409):  # a new name in a collection that is there has none of these
            raise refused(self.url, "a look at its server", answer)
        told = answer.headers.get("dav", "")
        if "2" not in [word.strip() for word in told.split(",")]:
            says = f"DAV: {one_line(told, 60)}" if told else "no WebDAV"
            raise Unsupported(
                f"{self.url}: its server has no locks ({says}, and class 2 is needed)",
                remedy="choose a place on a WebDAV server that has them",
            )

    def _lock(self) -> None:
        sent = _now()
        timeout = f"Second-{round(self._asked)}"
        body = _LOCK.format(escape(self._holder.owner))
        try:
            answer = self._dav.ask("LOCK", body, Depth="0", Timeout=timeout, Content_Type=_XML)
        except (ConnectionLost, WrongState) as error:
            self._adopt()
            ends = f"if the lock was made all the same, it ends within {format_duration(self._asked)}"
            error.remedy = error.remedy or ("" if self._token else ends)
            raise
        if answer.status == 423:
            raise held(look(self._dav))
        if answer.status not in (200, 201):
            self._adopt()
            raise refused(self.url, "the lock", answer)
        found = active_locks(answer.body)
        self._token = answer.token or (found[0].token if found else "")
        if not self._token:
            self._adopt()
            raise WrongState(f"{self.url}: its server gave a lock without a token")
        self._granted_by(answer, sent)
        self._took(self._token)
        if self._granted < _SHORTEST:
            raise Unsupported(f"{self.url}: its server grants locks for {self._granted:g} s only")

    def _adopt(self) -> None:
        """Find our lock, to end it, where its answer was lost, or a proxy gave another: nobody else
        would end it."""
        try:
            seen = look(self._dav)
        except FarmhandError:
            return
        if seen.held and self._holder.mark in seen.owner:
            self._token = seen.token

    def _write_first(self) -> SharedLock:
        file, foreign, age = _file(self._dav)
        before = SharedLock(self.url, file=file, foreign=foreign, age=age)
        if foreign:
            raise WrongState(
                f"{self.url} is a file that is not farmhand's: it stays as it is",
                remedy="write another name into the farm file, of a file that isn't there yet",
            )
        self._write()
        return before

    def _write(self) -> None:
        answer = self._ask_as_holder("PUT", _note(self._holder), Content_Type="application/json")
        if not answer.good:
            raise refused(self.url, "to write who holds it", answer)

    def tell_build(self, build: str) -> None:
        """Have others see which build it is. FarmhandError."""
        with self._guard:
            self._holder = replace(self._holder, build=build)
            self._write()

    # -- keeping it ---------------------------------------------------------------------------

    @property
    def lost(self) -> str:
        """Why it is lost; "": it isn't, as far as is known."""
        return self._why_lost

    @property
    def granted(self) -> float:
        """Seconds that it lasts without a refresh."""
        return self._granted

    def watch(self, lost: Callable[[str], object]) -> None:
        """Have somebody told why it is lost, once, by whichever thread finds that out."""
        with self._guard:
            self._watchers.append(lost)
            if self._why_lost:
                lost(self._why_lost)

    def check(self) -> None:
        """Ask the server now whether it is still ours, before something that can't be taken back. It may
        be lost the moment after; then it was ours for the time granted from now on. LeaseLost."""
        with self._guard:
            trouble = "" if self._why_lost else self._refresh()
            if self._why_lost or trouble:
                raise LeaseLost(
                    f"the lock {self.url} is lost: {self._why_lost}" if self._why_lost
                    else f"nobody knows whether the lock {self.url} is still ours: {trouble}",
                    remedy="see what whoever holds it now does, then build again",
                )  # fmt: skip

    def _keep(self) -> None:
        wait = self._interval()
        while not self._end.wait(wait):
            with self._guard:
                if self._end.is_set() or self._why_lost:
                    return
                trouble = self._refresh()
                wait = self._interval() / 4 if trouble else self._interval()

    def _interval(self) -> float:
        """Also where more is granted than was asked for, a lock that was broken is to be noticed."""
        return min(self._granted, self._asked) / 3

    def _refresh(self) -> str:
        """Refresh it, and see whether it is lost. Returns what is in the way, where it isn't known."""
        sent = _now()
        try:
            answer = self._ask_as_holder("LOCK", Timeout=f"Second-{round(self._asked)}")
        except FarmhandError as error:
            trouble = error.message
        else:
            trouble = self._judge(answer, sent)
        if trouble and _now() >= self._until:
            self._lose(f"it could not be refreshed before its end: {trouble}")
        return trouble

    def _judge(self, answer: DavAnswer, sent: float) -> str:
        if answer.status in _GONE:
            self._lose(f"its server knows it no more ({answer.status})")
            return ""
        if not answer.good:
            return refused(self.url, "its refresh", answer).message
        shown = {lock.token for lock in active_locks(answer.body)} - {""}
        new = answer.token or next(iter(shown), "")
        if self._token not in shown | {answer.token} and new:
            if answer.status == 201 or answer.token:  # nginx: nobody wants that one
                self._ask_quietly("UNLOCK", Lock_Token=f"<{new}>")
            self._lose("its server knows it no more, and gave another")
            return ""
        self._granted_by(answer, sent)
        return ""

    def _granted_by(self, answer: DavAnswer, sent: float) -> None:
        """Note how long it lasts, counted from when it was asked for. One without an end is refreshed as
        if it had the end that we asked for."""
        mine = [lock.left for lock in active_locks(answer.body) if lock.token in ("", self._token)]
        self._granted = next((left for left in mine if left is not None), self._asked)
        self._until = sent + self._granted

    def _lose(self, why: str) -> None:
        if not self._why_lost:
            self._why_lost = why
            for tell in self._watchers:
                tell(why)

    # -- giving it back -----------------------------------------------------------------------

    def give_back(self) -> None:
        """Remove the file, and end the lock; nothing, if it is lost. FarmhandError: it may be held until
        it ends by itself."""
        self._end.set()
        with self._guard:
            if self._token and not self._why_lost:
                give_back(self._dav, self._token)
            self._token = ""
        if self._keeper is not None:
            self._keeper.join()

    def _drop(self) -> None:
        """After a failure, whose error is the one to show."""
        if self._token:
            try:
                self._ask_quietly("UNLOCK", Lock_Token=f"<{self._token}>")
            finally:
                self._token = ""

    def _ask_quietly(self, method: str, **headers: str) -> None:
        try:
            self._dav.ask(method, **headers)
        except FarmhandError:
            return

    def _ask_as_holder(self, method: str, body: str = "", **headers: str) -> DavAnswer:
        return self._dav.ask(method, body, If=f"(<{self._token}>)", **headers)


def give_back(dav: Dav, token: str) -> None:
    """Remove the file and end the lock of that token. If it is another's by now, nothing happens to it.
    FarmhandError: the server can't be asked."""
    # First, as long as nobody else can have it: on most servers the lock goes with its file. The token
    # is said to be the file's, for without that Apache wants it to be the collection's as well.
    dav.ask("DELETE", If=f"<{dav.path}> (<{token}>)")
    answer = dav.ask("UNLOCK", Lock_Token=f"<{token}>")
    if not answer.good and answer.status not in _GONE:
        raise refused(dav.url, "to end the lock", answer)


def held(seen: SharedLock) -> Busy:
    """The refusal where somebody has it."""
    words = str(seen) if seen.held else f"{seen.url} is locked, and its server doesn't say by whom"
    return Busy(
        f"the lock that others share: {words}",
        remedy=(
            "wait until that ends; or, if it is dead for sure: ", Call("unlock", remote=True, force=True)
        ),
    )  # fmt: skip


def _note(holder: LockHolder) -> str:
    about = "farmhand holds a lock on this file while it builds; it removes both at its end"
    return as_json({"about": about, **asdict(holder)}, indent=1) + "\n"
