"""A build's limits where the kernel keeps them, by cgroup v2: under a real kernel, as builders have."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
from pathlib import Path

from builds.packages.formats import isolation
from builds.packages.formats.isolation import Isolation
from host.paths import cache_dir
from host.run import which
from tests.contract import small_guest

TOOLS = (
    "sh", "unshare", "setpriv", "setsid", "prlimit", "mount", "ip", "id", "mkdir", "rm", "rmdir", "cat",
    "grep", "sleep", "env", "tail", "dd", "ls", "ps",
)  # fmt: skip
DIRECTORIES = (
    "bin", "lib", "lib64", "proc", "sys", "dev", "run", "tmp", "var", "var/tmp", "build", "etc",
)  # fmt: skip
INIT = """#!/bin/sh
export PATH=/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for n in 1 2 3 4; do
  status=0
  sh -eu /case$n >/said 2>&1 || status=$?
  echo "CASE $n: $status; $(eval "$OVER"); $(ls -d /sys/fs/cgroup/f* 2>/dev/null); $(tail -n 1 /said)"
done
echo "LEFT: $(ps -o args= -u builder)"
echo o >/proc/sysrq-trigger
sleep 60
"""
CASES = (
    ("tail /dev/zero", 64 * 2**20),
    ("while :; do sleep 600 & done 2>/dev/null; wait", None),
    ("setsid -f sleep 600; id -un", 64 * 2**20),
    ("false", 64 * 2**20),
)


def guest(work: Path) -> Path:
    """An initial RAM disk that runs the cases."""
    files = dict.fromkeys(DIRECTORIES, (stat.S_IFDIR | 493, b""))
    for tool in TOOLS:
        path = which(tool)
        assert path, f"no {tool} here"
        files[f"bin/{tool}"] = (stat.S_IFREG | 0o755, Path(path).read_bytes())
        linked = subprocess.run(["ldd", path], check=False, capture_output=True, text=True).stdout
        for word in linked.split():
            if word.startswith("/"):
                where = "lib64" if "ld-linux" in word else "lib"
                files[f"{where}/{Path(word).name}"] = (stat.S_IFREG | 0o755, Path(word).read_bytes())
    for name in ("libnss_files.so.2", "libc.so.6"):
        for found in Path("/lib/x86_64-linux-gnu").glob(name):
            files[f"lib/{name}"] = (stat.S_IFREG | 0o755, found.read_bytes())
    text = "root:x:0:0::/:/bin/sh\nbuilder:x:999:999::/:/bin/sh\n"
    files["etc/passwd"] = (stat.S_IFREG | 0o644, text.encode())
    files["etc/group"] = (stat.S_IFREG | 0o644, b"root:x:0:\nbuilder:x:999:\n")
    for number, (build, memory) in enumerate(CASES, 1):
        apart = Isolation(
            user="builder", directory="/tmp", environment={"PATH": "/bin", "LD_LIBRARY_PATH": "/lib"},
            memory=memory,
        )  # fmt: skip
        settings = {**apart.settings(build), "TASKS": "40"}
        exports = "".join(f"export {key}={shlex.quote(text)}\n" for key, text in settings.items())
        files[f"case{number}"] = (stat.S_IFREG | 0o644, (exports + apart.script).encode())
    init = INIT.replace('eval "$OVER"', isolation.OVER)
    files["init"] = (stat.S_IFREG | 0o755, init.encode())
    path = work / "initrd"
    path.write_bytes(small_guest.newc([(name, *value) for name, value in files.items()]))
    return path


def test_memory_and_processes_are_the_whole_builds(tmp_path):
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu, "this test needs qemu-system-x86"
    kernel = small_guest.build(cache_dir()).kernel
    done = subprocess.run(
        [qemu, "-accel", "tcg", "-cpu", "max", "-m", "512", "-nodefaults",
         "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", kernel,
         "-initrd", guest(tmp_path), "-append", "console=ttyS0 panic=-1 quiet"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("CASE", "LEFT"))]
    assert said == [
        "CASE 1: 137; memory; ; Killed", "CASE 2: 2; processes; ; ", "CASE 3: 0; ; ; builder",
        "CASE 4: 1; ; ; ", "LEFT: ",
    ], done.stdout + done.stderr  # fmt: skip
