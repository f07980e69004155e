"""Run as a program: enter a mount namespace of our own, lay private files over the host's, start the
given daemons there, one after the other, and stay as the parent of what they leave behind. Standard
library only; started by ``hypervisors.libvirt.private``.

Staying matters: libvirt takes a guest for alive until its process is reaped. A QEMU's parent is
process 1, which in many containers reaps late or never: cutting a guest's power then takes seconds,
or fails. So the daemon and its QEMUs have a parent that reaps at once (prctl(2),
PR_SET_CHILD_SUBREAPER), and that ends with the last of them.

One JSON argument: ``argvs``, ``env``, ``start`` (the directory that they are started in), ``binds``
(pairs: ours, the host's path), ``kvm``: "as-is"; "hide" (an empty file that nobody may open lies over
/dev/kvm); or "uid:N" (a device node of the same numbers that belongs to N, for QEMU runs as a user who
has no right to the host's node).

The host's later mounts and unmounts are seen here too, ours never there (MS_SLAVE): a store may mount
the file systems that disks are files on, and must be able to unmount them.

Python 3.11 has no os.unshare and no mount(2) at all, hence ctypes. See unshare(2), mount(2),
mount_namespaces(7), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import sys
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 1 << 19
PR_SET_CHILD_SUBREAPER = 36
FILES = 8192
"""That a daemon may have open, as libvirt's own unit has it (libvirtd.service): some for each VM that
runs. GLib, which it is made with, ends it where there is none left for the next one."""
KVM = "/dev/kvm"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), data.encode()
    )
    _check(result, f"mount {source} on {target}")


def enter_as_root() -> None:
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "", MS_REC | MS_SLAVE)


def enter_as_user() -> None:
    """Enter a user namespace that maps only ourselves to ourselves. The rights in it end with the
    exec."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    mount("none", "/", "", MS_REC | MS_SLAVE)


def _cover_kvm(kvm: str, over: str) -> None:
    """``over``: a directory of ours to mount a small tmpfs on, seen in this namespace only (a bind
    from /run would carry its nodev)."""
    if kvm == "as-is" or not Path(KVM).exists():
        return
    number = Path(KVM).stat().st_rdev
    mount("farmhand", over, "tmpfs", 0, "size=64k,mode=0711")
    node = f"{over}/kvm"
    if kvm == "hide":
        os.close(os.open(node, os.O_CREAT | os.O_WRONLY, 0))
    else:
        os.mknod(node, stat.S_IFCHR | 0o600, number)
        os.chown(node, int(kvm.removeprefix("uid:")), -1)
    mount(node, KVM, "", MS_BIND)


def main() -> None:
    order = json.loads(sys.argv[1])
    if os.geteuid() == 0:
        enter_as_root()
        for ours, host in order["binds"]:
            mount(ours, host, "", MS_BIND)
        _cover_kvm(order["kvm"], order["over"])
    elif order["kvm"] == "hide":
        try:
            enter_as_user()
            _cover_kvm(order["kvm"], order["over"])
        except OSError as error:  # user namespaces are switched off: slower, not wrong
            sys.stderr.write(f"/dev/kvm stays in sight: {error}\n")
    os.chdir("/")
    os.umask(0o077)
    sys.exit(_start(order["argvs"], {**os.environ, **order["env"]}, order["start"]))


def _start(argvs: list[list[str]], env: dict[str, str], directory: str) -> int:
    """The exit status of the daemons' own starts, of the first that fails; the reaper lives on in a
    session of its own."""
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        answer = os.read(told, 1)
        return answer[0] if answer else 1
    os.setsid()
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    status = 0
    for argv in argvs:
        pid = os.fork()
        if pid == 0:
            _become(argv, env, directory)
        _, status = os.waitpid(pid, 0)
        if status:
            break
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whoever started us waits for these to close
        os.dup2(null, stream)
    os.write(tell, bytes([min(abs(os.waitstatus_to_exitcode(status)), 255)]))
    os.close(tell)
    # From now on the kernel reaps whoever ends, in that moment (wait(2), of an ignored SIGCHLD): libvirt
    # sleeps 0.2 s if it finds a QEMU there whose monitor has closed.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


def _become(argv: list[str], env: dict[str, str], directory: str) -> NoReturn:
    os.chdir(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:  # else it has more, or no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard) if hard >= 0 else FILES, hard))
    os.execve(argv[0], argv, env)  # noqa: S606


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(": ".join(str(part) for part in (problem.filename, problem.strerror) if part))
