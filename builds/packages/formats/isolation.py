"""A build kept apart: what runs of a package's source sees no network, and nothing in the VM that it
could talk to, and it ends when its time is over, with all that it started.

A script, which root runs in the VM. By unshare(1) the build gets namespaces of its own: a network with
loopback alone; process ids, so that the kernel ends every process in it when its first one ends; IPC of
System V; a host name; mounts, with a /tmp, /var/tmp, /run and /dev/shm of its own. Then setpriv(1) makes
it the build user for good: no capabilities, and no program gives it any (no_new_privs).

Its limits are the VM's own. With cgroup v2, memory and processes are those of the whole build; without,
of memory a process's address space (RLIMIT_AS), and how many processes the user has. How large a file
may become is RLIMIT_FSIZE. Its time is kept by whoever runs the script, who has it told SIGTERM."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from builds.classify import classify
from builds.step_run import StepFailed
from inventory.sizes import format_size

TOOLS: Final = {
    "unshare": "util-linux", "setpriv": "util-linux", "setsid": "util-linux", "prlimit": "util-linux",
    "mount": "mount", "ip": "iproute2",
}  # fmt: skip
"""What the script needs, each with the package that has it."""
TASKS: Final = 4096
"""Processes and threads that a build may have."""
_STATE = "/run/farmhand-build"
_TEMPORARY = "/build/.tmp"

# Arguments: the build's environment. Process 1 of its namespace stays root's: it collects what the
# build's processes leave, and the build can't signal it. Its end is the end of all of them.
_INSIDE = r"""
umask 022
[ -z "$NETWORK" ] || ip link set lo up
echo localhost >/proc/sys/kernel/hostname
for d in /tmp /var/tmp; do mount --bind "$TEMPORARY" "$d"; done
[ ! -d /dev/shm ] || mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
if [ -n "$NETWORK" ]; then
  mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run
  mkdir -m 1777 /run/lock
fi
cd "$DIRECTORY"
setsid prlimit $LIMITS -- setpriv --reuid "$BUILD_USER" --regid "$(id -g "$BUILD_USER")" --init-groups \
  --inh-caps=-all $RIGHTS -- env -i "$@" sh -euc "$BUILD" sh &
wait "$!"
"""
# The group is the kernel's word for what may be used and is ended together: cgroups(7).
_ISOLATED = r"""
umask 022
rm -rf "$TEMPORARY" "$STATE"
mkdir -m 1777 "$TEMPORARY"
mkdir -m 0755 "$STATE"
group=/sys/fs/cgroup/farmhand-build
if grep -qsw memory /sys/fs/cgroup/cgroup.controllers && mkdir -p "$group" &&
  { echo "+memory +pids" >/sys/fs/cgroup/cgroup.subtree_control; } 2>/dev/null &&
  [ -e "$group/memory.max" ] && [ -e "$group/pids.max" ]
then
  echo "${MEMORY:-max}" >"$group/memory.max"
  [ -z "$MEMORY" ] || [ ! -e "$group/memory.swap.max" ] || echo 0 >"$group/memory.swap.max"
  echo 1 >"$group/memory.oom.group"
  echo "$TASKS" >"$group/pids.max"
else
  group=
  LIMITS="$LIMITS${MEMORY:+ --as=$MEMORY}"
  echo unknown >"$STATE/over"
fi
child=
end() {
  kill -KILL "$child" 2>/dev/null || true
  wait "$child" 2>/dev/null || true
  [ -n "$group" ] || return 0
  if grep -q "^oom [1-9]" "$group/memory.events"; then echo memory >"$STATE/over"
  elif grep -q "^max [1-9]" "$group/pids.events"; then echo processes >"$STATE/over"
  fi
  [ ! -e "$group/cgroup.kill" ] || echo 1 >"$group/cgroup.kill"
  for n in 1 2 3 4 5 6 7 8 9 10; do rmdir "$group" 2>/dev/null && break; sleep 0.2; done
}
trap 'end; exit 143' TERM INT HUP
(
  [ -z "$group" ] || sh -c 'echo "$PPID" >"$0"' "$group/cgroup.procs"
  exec unshare $NETWORK --pid --ipc --uts --mount --fork --kill-child --mount-proc \
    sh -euc "$INSIDE" sh "$@"
) &
child=$!
status=0
wait "$child" || status=$?
end
exit "$status"
"""
RECIPE: Final = _ISOLATED + _INSIDE
"""The text of it."""
OVER: Final = f"cat {_STATE}/over 2>/dev/null || true"
"""Prints which limit of its group the build that ran last met: memory, processes, or none; or that it is
unknown, for there was no group."""

# What a program prints that gets no memory, process or room for a file; and one that wants the network.
_NO_MEMORY = re.compile(
    r"Cannot allocate memory|[Oo]ut of memory|memory exhausted|std::bad_alloc|MemoryError"
    r"|[Ff]ailed to (?:allocate|map)|cannot create shared object descriptor"
)
_NO_PROCESS = re.compile(r"[Cc](?:annot|an't) fork|fork: retry|fork: Resource temporarily unavailable")
_TOO_LARGE = re.compile(r"File size limit exceeded|File too large")
_NETWORK = re.compile(
    r"Temporary failure in name resolution|Could not resolve|Network is unreachable|unable to look up"
    r"|Name or service not known|Could not connect to|Connection timed out|ENETUNREACH|EAI_AGAIN"
)
_XFSZ = 128 + 25  # signal(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """How a build runs. ``memory``: bytes; ``disk``: of a file, bytes; None: no limit of its own.
    ``environment``: all that it gets. ``contained``: it is sbuild, which takes the network from what it
    builds by itself, gets it its dependencies before, and needs newuidmap(1), which is root's."""

    user: str
    directory: str
    environment: Mapping[str, str]
    memory: int | None = None
    disk: int | None = None
    contained: bool = False

    @property
    def script(self) -> str:
        """To be run by root, with ``settings``."""
        variables = (f"{name}={value}" for name, value in sorted(self.environment.items()))
        return f"set -- {shlex.join(variables)}\n{_ISOLATED}"

    def settings(self, build: str) -> Mapping[str, str]:
        """The script's own environment. ``build``: what is run, by ``sh -eu``."""
        size = "" if self.disk is None else f" --fsize={self.disk}"
        return {
            "BUILD": build, "INSIDE": _INSIDE, "DIRECTORY": self.directory, "BUILD_USER": self.user,
            "TEMPORARY": _TEMPORARY, "STATE": _STATE, "TASKS": str(TASKS),
            "NETWORK": "" if self.contained else "--net",
            "RIGHTS": "" if self.contained else "--no-new-privs --bounding-set=-all",
            "MEMORY": "" if self.memory is None else str(self.memory),
            "LIMITS": f"--core=0 --nproc={TASKS}{size}",
        }  # fmt: skip

    def failure(self, text: str, status: int, over: str) -> StepFailed:
        """Why the build failed. ``text``: the end of its log. ``over``: what ``OVER`` printed."""

        def failed(message: str, remedy: str) -> StepFailed:
            return StepFailed("source", message, remedy=remedy, exit=status)

        no_memory = over == "memory" or (over == "unknown" and _NO_MEMORY.search(text))
        if self.memory is not None and no_memory:
            most = format_size(self.memory)
            return failed(f"used more than its memory of {most}", "give the package more 'memory'")
        if over == "processes" or _NO_PROCESS.search(text):
            return failed(f"had more than {TASKS} processes", "have its build run fewer side by side")
        if self.disk is not None and (status == _XFSZ or _TOO_LARGE.search(text)):
            most = format_size(self.disk)
            return failed(f"made a file of more than {most}", "give the package a larger 'disk'")
        kind, evidence = classify(text, status=status)
        if kind in ("environment", "network") and _NETWORK.search(evidence):
            return failed(
                f"{evidence} (a build has no network)",
                "have the source bring what it fetches, or declare it under 'downloads'",
            )
        return StepFailed(kind, evidence or f"exited with {status}", exit=status)
