"""farmhand's own libvirtd: no systemd, no libvirt group, nothing of the host's libvirt touched.

A virtlogd of its own is beside it: what a guest writes on its console goes through that, which bounds
its log. It outlives a libvirtd that ends, for guests go on writing.

libvirtd's directories are compiled in, so as root it runs in a mount namespace of its own where
private directories lie over them (_enclose.py). As an ordinary user libvirtd takes its
places from the XDG variables. Either way its guests outlive it: a daemon that is started again finds
them through its state files and takes them over.

    directory/        definitions (etc), guests' monitor sockets (lib), logs (log): lost with it; and
                      at, which names the runtime directory that it lives in
    runtime/          run/ with the socket, the pid file and libvirt's notes on running guests
    cache/            what libvirt found out about QEMU (2-50 s to find out again)

The runtime directory of a user depends on how he came in (pam_systemd(8)): by ssh another than by cron.
A daemon that lives, or whose guests do, is used where it is: a second one would know nothing of these
guests, and change their disks under them.

No path of ours is in its configuration, where a blank ends a log's name and a colon begins one: as root
they are named as seen inside; the session's daemon starts in the log's directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import quote

from host.documents import Malformed, read_file
from host.files import (
    check_own_directory,
    file_error,
    is_at,
    make_directory,
    matching,
    open_lock,
    open_new,
    own_directory,
    same_place,
)
from host.processes import command_line, end, parent_of
from host.run import Runner, which
from hypervisors.api import Directories
from inventory.errors import (
    Call,
    CommandFailed,
    DriverFailed,
    NotOurs,
    Unsupported,
    WrongState,
    some,
)

_ENCLOSE = str(Path(__file__).with_name("_enclose.py"))  # run, not imported: it would load the C library
_QEMU_USER = "libvirt-qemu"  # compiled into Debian's libvirt: must resolve, or libvirtd won't start
_QEMU_UID = 64055  # Debian's own number for it (base-passwd)
_SOCKET_PATH_MAX = 107  # unix(7): sun_path has 108 bytes with the final NUL
_TRIES = 1000  # to open the lock file that stopping commands remove
_START_LIMIT = 120.0  # seconds; 0.1 is usual, much more where many guests are taken over
_END_LIMIT = 15.0
_CONSOLE_MAX = 4 * 2**20
"""Bytes of a console log before it is turned over; a start's log has two such files at most. A boot says
some 100 KiB."""


def private_libvirt(
    directories: Directories, *, hide_kvm: bool | Callable[[], bool] = False
) -> PrivateLibvirt:
    """The daemon of the farm that has these directories. ``hide_kvm``: see ``PrivateLibvirt``."""
    return PrivateLibvirt(
        directories.farm / "libvirt", directories.runtime, directories.cache / "libvirt", hide_kvm
    )


class PrivateLibvirt:
    """One farm's daemon. Any number of processes may hold one of these for the same farm."""

    def __init__(
        self, directory: Path, runtime: Path, cache: Path, hide_kvm: bool | Callable[[], bool]
    ) -> None:
        """``hide_kvm``, or what tells it when a daemon is used: KVM doesn't work here. libvirtd as root
        would find that QEMU's user can't open /dev/kvm, though it was there when probed, and probe QEMU
        again at every step (4 s)."""
        self._directory = directory.absolute()
        self._runtime = runtime.absolute()
        self._cache = cache.absolute()
        self._kvm_is_hidden = hide_kvm
        self._root = os.geteuid() == 0
        if (noted := _path_in(self._directory / "at")) not in (None, self._runtime):
            given, self._runtime = self._runtime, noted
            if not self._lives():
                self._runtime = given

    # -- what others ask --------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The daemon's directory. It is there once something was made."""
        return self._directory

    def defined(self) -> frozenset[str]:
        """Names of the guests that it has, running or not, whether or not it runs itself."""
        return frozenset(path.stem for path in matching(self._definitions, "*.xml"))

    def qemu_uid(self) -> int | None:
        """The uid QEMU runs as; None: our own."""
        return qemu_user() if self._root else None

    def running(self) -> bool:
        """Whether a daemon listens; a socket left by a dead one doesn't count."""
        return _listens(self._socket)

    def uri(self) -> str:
        """The connection URI; starts the daemon if it isn't running (0.1-0.3 s, else 0.1 ms).

        DriverFailed where it doesn't start, Unsupported where libvirtd is missing."""
        check_runtime(self._runtime)
        check_own_directory(self._runtime.parent)  # before we trust what listens there
        check_own_directory(self._runtime)
        if self.is_anothers():
            raise NotOurs(
                f"{self._runtime} has the private libvirtd of another state directory: {self._whose()}",
                remedy="set FARMHAND_RUNTIME_DIR to another directory, or give the farm another name",
            )
        if not self._is_up() or self._lacks_kvm() or self._lost():
            with self._lock():
                if self.running() and self._lost():
                    self._refuse_lost()
                    _end_daemon(self._pidfile)
                    _end_daemon(self._keeper_pidfile)
                elif self.running() and self._lacks_kvm():
                    _end_daemon(self._pidfile)
                if not self._is_up():
                    self._start()
        mode = "system" if self._root else "session"
        return f"qemu+unix:///{mode}?socket={quote(os.fsencode(self._socket))}"

    def is_anothers(self) -> bool:
        """Whether the daemon that listens there is of another state directory."""
        whose = self._whose()
        if whose is None or same_place(whose, self._directory):
            return False
        return whose.exists() and self.running()

    def _lost(self) -> bool:
        """Whether the daemon that runs has another directory than this one, which was removed, or put
        back from a backup. Such a daemon can keep nothing."""
        conf, pid = self._directory / "etc/libvirtd.conf", _pid(self._pidfile)
        if not self._root or pid is None:
            return not conf.exists()
        root = Path(f"/proc/{pid}/root")  # as the daemon sees it: proc(5)
        try:
            return not conf.samefile(root / "etc/libvirt" / conf.name)
        except PermissionError:
            return False
        except OSError:
            return root.exists()  # one that was just killed has none any more, and has lost nothing

    def _refuse_lost(self) -> None:
        """WrongState where guests of such a daemon live."""
        if guests := dict(self._guests()):
            pids = " ".join(map(str, guests.values()))
            raise WrongState(
                f"{self._directory} was removed, or put back, while {some(sorted(guests))} ran: its "
                "private libvirtd can change nothing of that any more",
                remedy=f"end what runs, then go on with what is there: kill {pids}",
            )

    def _whose(self) -> Path | None:
        return _path_in(self._run / "of")

    def _lives(self) -> bool:
        """Whether this very daemon, or a guest of it, lives in the runtime directory."""
        try:
            check_own_directory(self._runtime.parent)
            check_own_directory(self._runtime)
        except WrongState:
            return False
        whose = self._whose()
        if whose is None or not same_place(whose, self._directory):
            return False
        return self.running() or bool(self.machines_running())

    def machines_running(self) -> tuple[str, ...]:
        """Names of the guests that live, whether or not the daemon does."""
        return tuple(sorted(name for name, _ in self._guests()))

    def stop(self, *, force: bool = False) -> None:
        """End the daemon; its runtime files go, and its directory too when it holds no definition.

        WrongState while machines run; ``force`` cuts their power instead."""
        if not self._runtime.exists() and not self._directory.exists():
            return
        with self._lock():
            if (names := self.machines_running()) and not force:
                raise WrongState(
                    f"the private libvirtd still runs {', '.join(names)}",
                    remedy=("stop them first: ", Call("stop", all=True)),
                )
            children = [*map(_pid, self._pidfiles), *(pid for _, pid in self._guests())]
            reapers = {parent for pid in children if pid and (parent := parent_of(pid))}
            _end_daemon(self._pidfile)
            for name, pid in self._guests():
                _end(pid, _guest(name), signal.SIGKILL)
            _end_daemon(self._keeper_pidfile)
            for pid in reapers:
                _end(pid, _ENCLOSE, None)  # by itself, now that it has no child
            for path in (self._run, self._runtime / "c", self._runtime / "k"):
                _remove(path)
            if not any(self._definitions.glob("*.xml")):
                _remove(self._directory)
            (self._runtime / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files keep it: fine
            self._runtime.rmdir()

    # -- places -----------------------------------------------------------------------------------

    @property
    def _run(self) -> Path:
        return self._runtime / "run"

    @property
    def _socket(self) -> Path:
        return _socket(self._runtime, root=self._root)

    @property
    def _blind(self) -> Path:
        """It is there while the daemon was started with ``hide_kvm``."""
        return self._run / "no-kvm"

    def _lacks_kvm(self) -> bool:
        """KVM works by now, and the daemon that runs doesn't see it."""
        return not self._hide_kvm and self._blind.exists()

    @cached_property
    def _hide_kvm(self) -> bool:
        hidden = self._kvm_is_hidden
        return hidden if isinstance(hidden, bool) else hidden()

    @property
    def _pidfile(self) -> Path:
        return self._run / "libvirtd.pid"

    @property
    def _keeper_pidfile(self) -> Path:
        return self._run / "virtlogd.pid"

    @property
    def _pidfiles(self) -> tuple[Path, ...]:
        return self._pidfile, self._keeper_pidfile

    @property
    def _notes(self) -> Path:
        """Where libvirt keeps NAME.pid and NAME.xml of running guests."""
        return self._run / "qemu" if self._root else self._run / "libvirt" / "qemu" / "run"

    @property
    def _definitions(self) -> Path:
        base = self._directory / "etc"
        return base / "qemu" if self._root else base / "libvirt" / "qemu"

    @property
    def _log(self) -> Path:
        return self._directory / "log" / "libvirtd.log"

    # -- start ------------------------------------------------------------------------------------

    def _is_up(self) -> bool:
        """Whether both daemons listen."""
        return self.running() and _listens(_keeper_socket(self._runtime, root=self._root))

    def _start(self) -> None:
        """Start what isn't running."""
        order = self._order(_needed("virtlogd"), _needed("libvirtd"))
        before = self._log.stat().st_size if self._log.exists() else 0
        _write(self._run / "of", [str(self._directory)])
        _write(self._directory / "at", [str(self._runtime)])
        if not self.running():
            self._blind.unlink(missing_ok=True)
            if self._hide_kvm:
                self._blind.touch(mode=0o600)
        # libvirtd -d leaves our session and returns once it listens, so no time limit of the
        # runner's can reach it. Isolated Python: nothing of the caller's environment is imported.
        try:
            Runner().change(
                sys.executable, "-I", "-S", _ENCLOSE, json.dumps(order), timeout=_START_LIMIT
            )
        except CommandFailed as error:
            from host.hints import NAMESPACES, ROOM, hint

            logged = _tail(self._log, before)
            said = [*error.stderr.strip().splitlines(), *logged]
            known = hint("\n".join(said), (ROOM, *NAMESPACES), directory=self._directory)
            raise DriverFailed(
                f"the private libvirtd did not start: {known.line or (said or [error.message])[-1]}",
                remedy=known.remedy or (f"see {self._log}" if logged else ""),
                detail="\n".join([error.detail, *logged]),
            ) from error
        if not self._is_up():
            raise DriverFailed(
                "the private libvirtd ended right after its start",
                remedy=f"see {self._log}",
                detail="\n".join(_tail(self._log, before)),
            )

    def _order(self, keeper: str, daemon: str) -> dict[str, object]:
        """Make all that the daemons need; returns what ``_enclose`` is to do. NoSpace, WrongState."""
        try:
            if self._root:
                return self._order_as_root(keeper, daemon)
            return self._order_as_user(keeper, daemon)
        except OSError as error:
            raise file_error(error, Path(error.filename or self._directory), "write") from error

    def _order_as_root(self, keeper: str, daemon: str) -> dict[str, object]:
        uid = qemu_user()
        ours, run = self._directory, self._run
        # QEMU's user passes through these on its way to its monitor socket and console log
        places = {
            ours / "etc": "/etc/libvirt",
            ours / "lib": "/var/lib/libvirt",
            ours / "log": "/var/log/libvirt",
            self._cache: "/var/cache/libvirt",
            run: "/run/libvirt",
        }
        for path, host in places.items():
            make_directory(path, mode=0o711)
            path.chmod(0o711)  # of one that was killed before it could
            make_directory(Path(host), mode=0o755)  # empty: a place to lay ours over
        qemu_conf = [
            f'user = "+{uid}"',
            f'group = "+{uid}"',
            'stdio_handler = "logd"',
            "dynamic_ownership = 0",  # the disk store gives QEMU its files; templates stay as they are
            "remember_owner = 0",
            'security_driver = "none"',
            "namespaces = []",
            "cgroup_controllers = []",
        ]
        _write(ours / "etc/qemu.conf", qemu_conf)
        self._write_confs(
            'auth_unix_ro = "none"', f'unix_sock_dir = "{places[run]}"', log=places[ours / "log"]
        )
        binds = [(str(path), host) for path, host in places.items()]
        binds += self._user_database(uid)
        kvm = "hide" if self._hide_kvm else f"uid:{uid}"
        return self._order_of(keeper, daemon, {}, kvm, binds)

    def _user_database(self, uid: int) -> list[tuple[str, str]]:
        """Copies of passwd and group in which QEMU's user exists; none needed where it does."""
        try:
            pwd.getpwnam(_QEMU_USER)
        except KeyError:
            pass
        else:
            return []
        lines = {
            "passwd": f"{_QEMU_USER}:x:{uid}:{uid}:farmhand:/nonexistent:/usr/sbin/nologin",
            "group": f"{_QEMU_USER}:x:{uid}:",
        }
        for name, line in lines.items():
            text = Path("/etc", name).read_text(encoding="utf-8", errors="surrogateescape")
            copy = self._directory / "etc" / name
            _write(copy, [text.rstrip("\n"), line], mode=0o644)
        return [(str(self._directory / "etc" / name), f"/etc/{name}") for name in lines]

    def _order_as_user(self, keeper: str, daemon: str) -> dict[str, object]:
        ours, short = self._directory, self._runtime / "c"
        for path in (ours / "etc/libvirt/qemu", ours / "log", self._run / "libvirt", self._cache):
            make_directory(path, mode=0o700)
        # The guests' monitor sockets are below XDG_CONFIG_HOME: reach it by a short name.
        if not short.is_symlink() or short.readlink() != ours / "etc":
            short.unlink(missing_ok=True)
            short.symlink_to(ours / "etc")
        _write(ours / "etc/libvirt/qemu.conf", ['stdio_handler = "logd"'])
        env = {
            "XDG_CONFIG_HOME": str(short),
            "XDG_CACHE_HOME": str(self._cache),
            "XDG_RUNTIME_DIR": str(self._run),
            "XDG_DATA_HOME": str(ours / "data"),
        }
        self._write_confs()
        return self._order_of(keeper, daemon, env, "hide" if self._hide_kvm else "as-is", [])

    @property
    def _conf(self) -> Path:
        return self._directory / "etc/libvirtd.conf"

    @property
    def _keeper_conf(self) -> Path:
        return self._directory / "etc/virtlogd.conf"

    def _write_confs(self, *lines: str, log: str = "") -> None:
        """Both daemons'. ``lines``: of libvirtd's. ``log``: the directory of their log, as it is seen
        there; "": where they start."""
        outputs = f'log_outputs = "3:file:{Path(log, self._log.name)}"'
        # libvirtd's own default is 0777, trusting polkit: here only the owner may talk to it.
        perms = ('unix_sock_rw_perms = "0700"', 'unix_sock_ro_perms = "0700"')
        _write(self._conf, [*lines, 'auth_unix_rw = "none"', *perms, outputs])
        _write(self._keeper_conf, [f"max_size = {_CONSOLE_MAX}", "max_backups = 1", outputs])

    def _order_of(
        self, keeper: str, daemon: str, env: dict[str, str], kvm: str, binds: list[tuple[str, str]]
    ) -> dict[str, object]:
        over = self._runtime / "k"
        make_directory(over, mode=0o711)
        all_of_them = (
            (keeper, self._keeper_conf, self._keeper_pidfile,
             _keeper_socket(self._runtime, root=self._root)),
            (daemon, self._conf, self._pidfile, self._socket),
        )  # fmt: skip
        argvs = []
        for program, conf, pidfile, where in all_of_them:
            if not _listens(where):
                for path in (where, pidfile):
                    path.unlink(missing_ok=True)  # of a dead one, and we hold the lock
                argvs.append([program, "-d", "-f", str(conf), "-p", str(pidfile)])
        start = str(self._log.parent)
        return {
            "argvs": argvs, "env": env, "kvm": kvm, "over": str(over), "binds": binds, "start": start,
        }  # fmt: skip

    # -- the processes ----------------------------------------------------------------------------

    def _guests(self) -> Iterator[tuple[str, int]]:
        """Live QEMUs of this daemon, each as machine name and pid. A pid that another program has by now
        doesn't count, nor a note from before a reboot."""
        for note in matching(self._notes, "*.pid"):
            pid = _pid(note)
            if pid and _guest(note.stem) in _command_line(pid):
                yield note.stem, pid

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Of the kernel's, so a killed holder frees it. ``stop`` removes the file: look again
        whether the one we hold is still the one there."""
        path, mode = self._runtime / "lock", 0o711 if self._root else 0o700
        for _ in range(_TRIES):
            own_directory(self._runtime.parent, mode=0o711)  # below /tmp others could have made it
            own_directory(self._runtime, mode=mode)
            try:
                handle = open_lock(path)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if is_at(handle, path):
                    yield
                    return
            finally:
                os.close(handle)
        raise DriverFailed(f"{path} is removed again and again", remedy="see who does, and try again")


def check_runtime(directory: Path) -> None:
    """DriverFailed if a daemon's sockets can't lie in that directory."""
    root = os.geteuid() == 0
    sockets = [_socket(directory, root=root), _keeper_socket(directory, root=root)]
    if not root:  # as root the guests' sockets are under /var/lib/libvirt, as seen inside
        domain = "domain-9999-" + "x" * 20  # libvirt cuts the name there
        sockets.append(directory / "c/libvirt/qemu/lib" / domain / "monitor.sock")
        # and it probes QEMU with -qmp unix:PATH,server=on, and PATH as it is (qemuProcessQMPLaunch)
        if not {",", "="}.isdisjoint(str(directory)):
            raise DriverFailed(
                f"{directory}: libvirt can't name a socket there to QEMU, for its ',' or '='",
                remedy="set FARMHAND_RUNTIME_DIR to a path without",
            )
    length = max(len(os.fsencode(path)) for path in sockets)
    if length > _SOCKET_PATH_MAX:
        raise DriverFailed(
            f"{directory}: {length - _SOCKET_PATH_MAX} bytes too long for the sockets in it",
            remedy="set FARMHAND_RUNTIME_DIR to a shorter path, or give the farm a shorter name",
        )


def _socket(runtime: Path, *, root: bool) -> Path:
    return runtime / "run" / ("libvirt-sock" if root else "libvirt/libvirt-sock")


def _keeper_socket(runtime: Path, *, root: bool) -> Path:
    return _socket(runtime, root=root).with_name("virtlogd-sock")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _needed(daemon: str) -> str:
    found = which(daemon)
    if found is None:
        raise Unsupported(
            f"{daemon} is not installed",
            remedy="apt-get install libvirt-daemon libvirt-daemon-driver-qemu",
        )
    return found


@cache
def qemu_user() -> int:
    """The uid of libvirt's QEMU user on this host, or the one Debian would give it."""
    try:
        return pwd.getpwnam(_QEMU_USER).pw_uid
    except KeyError:
        return _QEMU_UID


def _write(path: Path, lines: list[str], *, mode: int = 0o600) -> None:
    with open_new(path, mode=mode) as file:
        file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def _path_in(file: Path) -> Path | None:
    """The path that the file holds, if it can be read."""
    try:
        text = os.fsdecode(read_file(file)).strip()
    except (OSError, Malformed):
        return None
    return Path(text) if text and "\0" not in text else None


def _pid(path: Path) -> int | None:
    try:
        pid = int(read_file(path))
    except (OSError, ValueError):
        return None
    return pid if 0 < pid < 2**31 else None


def _command_line(pid: int) -> str:
    try:
        return " ".join(command_line(pid))
    except OSError:
        return ""


def _guest(name: str) -> str:
    """What a guest's command line has."""
    return f"guest={name},"


def _end(pid: int, sign: str, how: signal.Signals | None) -> bool:
    """Send the process a signal (None: none), and wait until it is gone. Returns False if it is still
    there. ``sign``: part of its command line; a process without it has got the pid since, and is let
    alone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # looked at only now: what has the pid after this is not what the descriptor is of
        return sign not in _command_line(pid) or end(handle, how, timeout=_END_LIMIT)
    finally:
        os.close(handle)


def _end_daemon(pidfile: Path) -> None:
    pid, named = _pid(pidfile), str(pidfile)
    if pid and not _end(pid, named, signal.SIGTERM):
        _end(pid, named, signal.SIGKILL)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _tail(path: Path, start: int) -> list[str]:
    """The last lines of what was written after the first ``start`` bytes."""
    try:
        return path.read_bytes()[start:].decode(errors="replace").splitlines()[-5:]
    except OSError:
        return []
