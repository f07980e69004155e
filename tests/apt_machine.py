"""The real apt and dpkg of this machine, with state and settings in a directory of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_CONFIG = """
Dir "{top}";
Dir::State::status "{top}/root/var/lib/dpkg/status";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "0";
Acquire::http::Proxy "DIRECT";
DPkg::Options {{ "--root={top}/root"; "--log={top}/dpkg.log"; "--force-not-root"; }};
DPkg::Path "";
"""


class AptMachine:
    def __init__(self, top: Path, options: str = "") -> None:
        self.top = top
        for name in (
            "etc/apt/apt.conf.d", "etc/apt/sources.list.d", "etc/apt/preferences.d",
            "etc/apt/trusted.gpg.d", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial",
            "var/log/apt", "root/var/lib/dpkg/info", "root/var/lib/dpkg/updates",
        ):  # fmt: skip
            (top / name).mkdir(parents=True)
        (top / "root/var/lib/dpkg/status").touch()
        (top / "apt.conf").write_text(_CONFIG.format(top=top) + options)

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "APT_CONFIG": str(self.top / "apt.conf"), "LC_ALL": "C.UTF-8"}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)

    def source(self, stanza: str) -> None:
        (self.top / "etc/apt/sources.list.d/probe.sources").write_text(stanza)

    def update(self) -> str:
        """What it says; without a warning, or it would fail."""
        said = self.run("apt-get", "update", "--error-on=any")
        assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr
        return said.stdout

    def candidate(self, package: str) -> str:
        """The version that it would install; "" if it knows none."""
        said = self.run("apt-cache", "policy", package).stdout
        line = next((line for line in said.splitlines() if "Candidate:" in line), "")
        return line.partition(":")[2].strip()
