"""new: a farm file for a project, by flags and by asking; what it writes builds the project."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from cycle_farm import Lab, lab, run_cycle

from builds.new_farm import KINDS
from inventory.loader import load
from provision.site import Site
from tests.unit.cli_farm import ROOT, CommandLine, command_line

__all__ = ["lab"]
CONTROL = """\
Source: greet
Maintainer: A <a@example.org>
Build-Depends: debhelper-compat (= 13), libfoo-dev (>= 2) | libfoo2-dev, valgrind [no-such-cpu],
 python3:any <!nocheck>, gcc-cross <cross>
Build-Depends-Indep: pandoc

Package: greet
Architecture: all
Depends: ${misc:Depends}, greet-data (= ${binary:Version}), curl, default-mta | mail-transport-agent
Description: greets

Package: greet-data
Architecture: all
Pre-Depends: dpkg (>= 1.20)
Description: whom

Package: greet-elsewhere
Architecture: no-such-cpu
Depends: greet-tools
Description: for others
"""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    (tmp_path / "cli").mkdir()
    yield from command_line(tmp_path / "cli")


def project(root: Path, *files: str, name: str = "Greet_2.0") -> Path:
    directory = root / name
    directory.mkdir(exist_ok=True)
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(CONTROL if file.endswith("control") else "all:\n")
    return directory


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["debian/control", "Makefile", "greet.spec"], "deb"),
        (["packaging/greet.spec", "Makefile"], "rpm"),
        (["GNUmakefile"], "make"),
        (["rpms/dev.spec", "rpms/prod.spec", "Makefile"], "autobuild"),
    ],
)
def test_the_kind_is_seen_in_the_projects_directory(
    cli: CommandLine, tmp_path: Path, files: list[str], kind: str
) -> None:
    source = project(tmp_path, *files)
    done = cli("new", "--source", str(source), "--json")
    assert (done.status, done.json["kind"], done.json["farm"]) == (0, kind, "greet-2-0"), done.err
    farm = load(cli.directory / "farm.yaml")
    assert (farm.farm, farm.source and farm.source.place) == ("greet-2-0", str(source))
    text = (cli.directory / "farm.yaml").read_text()
    assert "example" not in text
    assert "kata" not in text
    again = cli("new", "--source", str(source))
    assert again.error.endswith("farm.yaml is there already: nothing is overwritten")
    assert (cli.directory / "farm.yaml").read_text() == text
    (cli.directory / "link.yaml").symlink_to("nowhere")
    assert cli("new", "--source", str(source), "--out", "link.yaml").status != 0
    assert not (cli.directory / "nowhere").exists()


def test_what_a_debian_package_needs_is_in_the_template(cli: CommandLine, tmp_path: Path) -> None:
    """To be built (dpkg-checkbuilddeps wants build-essential of each), and to be installed."""
    assert cli("new", "--source", str(project(tmp_path, "debian/control"))).status == 0
    (template,) = load(cli.directory / "farm.yaml").templates.values()
    needs = ("build-essential", "fakeroot", "debhelper", "libfoo-dev", "python3", "pandoc")
    assert template.packages == (*needs, "curl", "default-mta", "dpkg")


def test_flags_say_it_and_a_url_has_no_directory(cli: CommandLine) -> None:
    url = "https://git.example.org/x/tool.git"
    refused = cli("new", "--source", url)
    assert "--kind" in refused.err
    assert not (cli.directory / "farm.yaml").exists()
    shown = cli("new", "--source", url, "--kind", "rpm", "--name", "our-tool", "--plan")
    assert not (cli.directory / "farm.yaml").exists()
    assert "farm: our-tool" in shown.out
    for words, what in (
        ((), "which project?"),
        (("--source", "nowhere"), "there is no directory"),
        (("--source", url, "--kind", "dep"), "did you mean deb?"),
        (("--source", url, "--kind", "deb", "--name", "Ä"), "not a host name label"),
        (("--source", url, "--kind", "autobuild", "--test", "x"), "--test: "),
    ):
        done = cli("new", *words)
        assert done.status != 0
        assert what in done.err, done.err


def on_a_terminal(cli: CommandLine, words: Sequence[str], answers: Mapping[bytes, str]) -> None:
    """It passes, once each question was asked and answered."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        cli.argv("new", *words), cwd=cli.directory, env={**cli.environment, "TERM": "xterm"},
        stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    for question, answer in answers.items():
        while question not in shown:
            shown += os.read(leader, 4096)
        os.write(leader, answer.encode() + b"\n")
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # EIO: nobody has it open any more
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0, shown


def test_on_a_terminal_it_asks_for_what_is_not_given(cli: CommandLine, tmp_path: Path) -> None:
    source = project(tmp_path, "debian/control", "Makefile")
    answers = {
        b"git URL [.]: ": str(source), b"How it is built [deb]: ": "make", b"[greet-2-0]: ": "",
        b"if there is one: ": "greet",
    }  # fmt: skip
    on_a_terminal(cli, (), answers)
    farm = load(cli.directory / "farm.yaml")
    assert farm.farm == "greet-2-0"
    assert farm.cycle is not None
    assert "make install" in str(farm.cycle.steps)
    assert farm.cycle.steps[-1].scripts == ("greet",)


def test_with_a_source_it_asks_only_for_what_cannot_be_seen(cli: CommandLine, tmp_path: Path) -> None:
    seen = str(project(tmp_path, "debian/control"))
    on_a_terminal(cli, ("--source", seen, "--out", "deb.yaml"), {})
    unseen = str(project(tmp_path, "README", name="other"))
    on_a_terminal(cli, ("--source", unseen), {b"How it is built [make]: ": ""})
    assert load(cli.directory / "farm.yaml").farm == "other"


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values() if kind.target])
def test_what_shows_that_it_works_is_run_where_it_was_installed(cli: CommandLine, kind: str) -> None:
    script = "greet \"wörld\" | grep '^Hello: '  # or not"
    url = "https://git.example.org/x/tool.git"
    assert cli("new", "--source", url, "--kind", kind, "--test", script).status == 0
    farm = load(cli.directory / "farm.yaml")
    assert farm.cycle is not None
    *_, install, test = farm.cycle.steps
    assert (install.name, test.name, test.scripts) == ("install", "test", (script,))
    assert test.vms == install.vms == ("target",)


SPEC = """\
%global debug_package %{nil}
Name: greet
Version: 1.0
Release: 1
Summary: greets whom you name
License: GPL-3.0-or-later
Source0: %{name}-%{version}.tar.gz
BuildRequires: gcc, make
%description
What most spec files have: needs, which rpm on Debian knows nothing of, and lines for bash.
%prep
%setup -q
%build
[[ -e Makefile ]] && make CFLAGS=-O1
%install
make install DESTDIR=%{buildroot}
%files
/usr/bin/greet
"""


@pytest.mark.parametrize(
    ("example", "kind", "only", "made"),
    [
        ("hello-deb", "deb", ["fetch", "package"], r"hello-deb_1.0_"),
        ("hello-deb", "make", ["fetch", "build"], "installed.tar.gz"),
        ("kata", "rpm", ["fetch", "package"], "kata-dev-1.0-1.noarch.rpm"),
        ("greet", "rpm", ["fetch", "package"], "greet-1.0-1."),
    ],
)
def test_what_it_writes_builds(
    cli: CommandLine, lab: Lab, example: str, kind: str, only: list[str], made: str
) -> None:
    """The steps that build, on sshds of this machine; installing is shown on VMs."""
    source = copytree(ROOT / "examples" / example, lab.root / "project")
    if example == "greet":
        (source / "greet.spec").write_text(SPEC)
    assert cli("new", "--source", str(source), "--kind", kind).status == 0
    ours = yaml.safe_load((cli.directory / "farm.yaml").read_text())
    file = lab.farm_file([])
    farm = json.loads(file.read_text())
    farm["vms"] = {"build": farm["vms"]["dev2"], "target": farm["vms"]["prod"]}
    farm |= {"source": ours["source"], "cycle": ours["cycle"]}
    file.write_text(json.dumps(farm, default=str))
    with Site(load(file), reporter=lab.told) as site:
        record = run_cycle(site, only=("reset-build", *only))
    assert [file.name for file in record.outputs if file.name.startswith(made)], record.outputs


def test_shipped_examples_differ_from_what_it_writes_by_the_project_alone(
    cli: CommandLine, tmp_path: Path
) -> None:
    """Who copies the example gets what new writes."""
    for kind in KINDS.values():
        example = load(ROOT / "inventory" / f"{kind.example}.yaml")
        out = tmp_path / f"{kind.name}.yaml"
        url = "https://git.example.org/x.git"
        assert cli("new", "--source", url, "--kind", kind.name, "--out", str(out)).status == 0
        written = load(out)
        assert written.cycle is not None
        assert example.cycle is not None
        assert [s.name for s in written.cycle.steps] == [s.name for s in example.cycle.steps]
        assert {*written.vms} == {*example.vms}
