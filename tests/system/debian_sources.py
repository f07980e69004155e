"""Debian 12's own source packages, fetched from where this machine gets its packages."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from provision.guest.debian import write_sources

_CONFIG = """\
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{top}/sources.list.d";
Dir::State "{top}/state";
Dir::State::status "/dev/null";
Dir::Cache "{top}/cache";
Acquire::Languages "none";
"""


def fetch_sources(names: Collection[str], top: Path) -> Mapping[str, Path]:
    """The .dsc file of each, with what it names beside it. ``top``: a directory for them, and for apt's
    own files; the machine's apt is left as it is."""
    for name in ("sources.list.d", "state/lists/partial", "cache/archives/partial", "sources"):
        (top / name).mkdir(parents=True)
    lists = top / "sources.list.d"
    for path in write_sources("bookworm", lists):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^(Types:.*)$", "Types: deb-src", text, flags=re.MULTILINE)
        path.write_text(re.sub(r"^deb\s", "deb-src ", text, flags=re.MULTILINE), encoding="utf-8")
    assert any(lists.iterdir()), "this machine's apt has no package source of Debian 12"
    (top / "apt.conf").write_text(_CONFIG.format(top=top))
    _apt(top, "update", "--error-on=any")
    _apt(top, "source", "--download-only", "--only-source", *names)
    found = {path.name.partition("_")[0]: path for path in (top / "sources").glob("*.dsc")}
    assert sorted(found) == sorted(names)
    return found


def _apt(top: Path, *words: str) -> None:
    # its own sandbox user may not write to a directory of root's
    argv = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *words]
    done = subprocess.run(
        argv, cwd=top / "sources", env={**os.environ, "APT_CONFIG": str(top / "apt.conf")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
