"""A farm of source packages: real git repositories, and source packages made by dpkg-source."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from builds.packages.sources import PackageSources, read_sources
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site

_WHEN = "Sun, 01 Feb 2026 10:00:00 +0000"
_ENV = {
    "GIT_AUTHOR_NAME": "Some Body", "GIT_AUTHOR_EMAIL": "some@example.org",
    "GIT_COMMITTER_NAME": "Some Body", "GIT_COMMITTER_EMAIL": "some@example.org",
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_DATE": _WHEN, "GIT_COMMITTER_DATE": _WHEN,
}  # fmt: skip
BUILDER = "builder: {host: here, address: 127.0.0.1, reset: [/bin/true]}"
_HEAD = """\
farm: packs
hosts: {{here: {{driver: ssh}}, none: {{driver: fake}}, kvm: {{driver: kvm}}}}
templates: {{base: {{import: base.qcow2, firstboot: none}}}}
ssh: {{key: key}}
vms: {{{vms}}}
repositories: {{stable: {{format: {format}, path: {top}/repository, channels: [experimental]{more}}}}}
"""


def control(name: str = "hello", depends: str = "debhelper-compat (= 13)") -> str:
    return (
        f"Source: {name}\nSection: misc\nPriority: optional\nMaintainer: Some Body <some@example.org>\n"
        f"Build-Depends: {depends}\nStandards-Version: 4.6.2\n\n"
        f"Package: {name}\nArchitecture: any\nDepends: ${{shlibs:Depends}}\nDescription: {name}\n it\n"
    )


def changelog(name: str = "hello", version: str = "1.0-1", distribution: str = "unstable") -> str:
    return (
        f"{name} ({version}) {distribution}; urgency=medium\n\n  * As it is.\n\n"
        f" -- Some Body <some@example.org>  {_WHEN}\n"
    )


def deb_files(name: str = "hello", version: str = "1.0-1", **more: str) -> dict[str, str]:
    return {
        "debian/control": control(name), "debian/changelog": changelog(name, version),
        "debian/rules": "#!/usr/bin/make -f\n%:\n\tdh $@\n", "debian/source/format": "3.0 (quilt)\n",
        "hello.c": "int main(void) { return 0; }\n", **more,
    }  # fmt: skip


def rpm_files(name: str = "tool", version: str = "2.0", release: str = "1%{?dist}") -> dict[str, str]:
    tags = f"Name: {name}\nVersion: {version}\nRelease: {release}\nSummary: x\nLicense: MIT\n"
    spec = f"{tags}%description\nx\n"
    return {f"{name}.spec": spec, "tool.sh": "echo\n"}


def git(directory: Path, *args: str | Path, **env: str) -> str:
    done = subprocess.run(
        ["git", "-C", directory, *args], env={**os.environ, **_ENV, **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def repository(directory: Path, files: Mapping[str, str]) -> Path:
    """With one commit."""
    directory.mkdir(parents=True)
    git(directory, "init", "-q", "-b", "master")
    commit(directory, "One", files)
    return directory


def commit(directory: Path, subject: str = "More", files: Mapping[str, str] | None = None) -> str:
    write(directory, files or {})
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", subject, "--allow-empty")
    return git(directory, "rev-parse", "HEAD")


class PackageFarm:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "farm.yaml"
        (directory / "key").touch(0o600)
        self.declare("")

    def declare(
        self, packages: str, build: str = "", *, builders: str = "builder", vms: str = BUILDER,
        format: str = "deb", more: str = "",
    ) -> None:  # fmt: skip
        """``packages``: lines, each a package's. ``build``: more of that section. ``more``: of the
        repository's."""
        lines = "".join(f"  {line}\n" for line in packages.strip().splitlines())
        section = f"packages:\n{lines}" if lines else ""
        self.file.write_text(
            _HEAD.format(vms=vms, format=format, top=self.directory, more=more)
            + section
            + f"build: {{builders: [{builders}], repository: stable, directory: '{self.all}'{build}}}\n"
        )

    @property
    def all(self) -> Path:
        """The directory of repositories."""
        directory = self.directory / "all"
        directory.mkdir(exist_ok=True)
        return directory

    def site(self, *, plan: bool = False) -> Site:
        return Site(load(self.file), reporter=QuietReporter(), plan=plan)

    def read(self, revision: str | None = None, *, plan: bool = False, **more) -> PackageSources:
        with self.site(plan=plan) as site:
            return read_sources(site, revision, **more)


@pytest.fixture
def farm(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageFarm]:
    with tempfile.TemporaryDirectory(prefix="fh-", dir="/dev/shm") as name:
        monkeypatch.setenv("FARMHAND_STATE_DIR", str(Path(name, "state")))
        yield PackageFarm(Path(name))
