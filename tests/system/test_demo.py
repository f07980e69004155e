"""The README's first command on real VMs, as a stranger types it; then nothing of it may be left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


class Place:
    """State and sockets of its own; the image cache is the machine's, as a second demo would find it."""

    def __init__(self, directory: Path) -> None:
        self.state, self.runtime = directory / "s", directory / "r"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "FARMHAND_FARM"},
            "FARMHAND_STATE_DIR": str(self.state),
            "FARMHAND_RUNTIME_DIR": str(self.runtime),
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", str(ROOT), *words],
            env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def json(self, *words: str) -> dict[str, Any]:
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr[-6000:]
        data = json.loads(done.stdout)
        assert isinstance(data, dict)
        return data

    def processes(self) -> list[str]:
        """Command lines of living processes that name this place."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.state) in line or str(self.runtime) in line:
                found.append(line)
        return found


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    directory = Path(tempfile.mkdtemp(prefix="fhd"))
    directory.chmod(0o711)  # QEMU runs as another user and passes through
    place = Place(directory)
    try:
        yield place
    finally:
        place("demo", "--destroy")
        rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def demo(place: Place) -> dict[str, Any]:
    return place.json("demo")


def test_both_vms_are_up_and_the_program_ran_in_prod(demo: dict[str, Any]) -> None:
    assert demo["ok"] is True
    assert demo["result"] == "passed"
    assert {vm["vm"]: vm["state"] for vm in demo["vms"]} == {"dev2": "running", "prod": "running"}
    assert all(step["ok"] and step["seconds"] >= 0 for step in demo["steps"])
    assert demo["program"]
    assert Path(demo["record"]).is_file()


def test_what_was_built_is_there_with_its_sum(demo: dict[str, Any]) -> None:
    made = {file["step"]: file for file in demo["artifacts"]}
    assert made["build-dev"]["name"].startswith("kata-dev-")
    assert made["build-prod"]["name"].startswith("kata-1")
    for file in made.values():
        kept = Path(demo["record"]).parent / file["path"]
        assert hashlib.sha256(kept.read_bytes()).hexdigest() == file["sha256"], file["name"]


def test_ssh_runs_a_command_in_prod(demo: dict[str, Any], place: Place) -> None:
    done = place("ssh", "--vm", "prod", "--command", "hostname")
    assert (done.returncode, done.stdout) == (0, "ab-kata-prod\n"), done.stderr


def test_status_log_history_and_console_answer(demo: dict[str, Any], place: Place) -> None:
    assert "running" in place("status").stdout
    assert "passed" in place("log").stdout
    assert "build" in place("history").stdout
    assert place("log", "--step", "build-prod").stdout
    assert place("console", "--vm", "prod", "--log").stdout


def test_a_second_clone_farm_changes_nothing(demo: dict[str, Any], place: Place) -> None:
    assert place.json("clone-farm")["changed"] is False


def test_balloon_is_what_the_guest_reached(demo: dict[str, Any], place: Place) -> None:
    place.json("balloon", "--vm", "dev2", "--to", "512M")
    (dev2,) = [vm for vm in place.json("status")["vms"] if vm["vm"] == "dev2"]
    assert dev2["memory"] == 512 * 2**20


def test_a_deb_is_built_installed_and_run_by_the_example_with_its_own_cycle(
    demo: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    """inventory/hello-deb.yaml's source and cycle, on the demo's VMs as they are: no boot is needed."""
    farm = yaml.safe_load((ROOT / "inventory" / "hello-deb.yaml").read_text())
    ours = yaml.safe_load((ROOT / "inventory" / "default.yaml").read_text())
    names = {"build": "dev2", "target": "prod"}
    for step in farm["cycle"]["steps"]:
        for key in ("reset", "checkout", "vm", "from", "to"):
            if key in step:
                step[key] = names[step[key]]
    path = tmp_path / "hello.yaml"
    path.write_text(yaml.safe_dump({**ours, "source": farm["source"], "cycle": farm["cycle"]}))
    assert place("adopt", "--farm", str(path)).returncode == 0  # the demo's farm has another file now
    built = place.json("cycle", "--farm", str(path), "--from", "fetch")
    (package,) = built["outputs"]
    assert package["name"].startswith("hello-deb_1.0_")
    alone = {"name": "alone", "vm": "prod", "root": True, "run": "apt-get install -y no-such-package"}
    path.write_text(yaml.safe_dump({**ours, "source": farm["source"], "cycle": {"steps": [alone]}}))
    failed = place("cycle", "--farm", str(path), "--from", "alone").stderr
    assert "network: the guest has no network: E: Unable to locate package no-such-package" in failed
    assert "'packages:'" in failed, "what to do"
    assert place("adopt").returncode == 0
    done = place("ssh", "--vm", "prod", "--command", "hello-deb")
    assert done.stdout == "hello-deb 1.0, built by a farm\n", done.stderr
    assert (built["result"], built["partial"]) == ("partial", "4/6")


def test_the_deb_goes_through_a_repository_to_the_other_vm(
    demo: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    """Built in one VM, published, and installed in the other one by its apt, from exactly the generation
    that the record names; once more, like that build; and by a flow whose four packages hold a bad one,
    which is found by bisection."""
    farm = yaml.safe_load((ROOT / "inventory" / "hello-deb.yaml").read_text())
    ours = yaml.safe_load((ROOT / "inventory" / "default.yaml").read_text())
    fetch, package = (step for step in farm["cycle"]["steps"] if step["name"] in ("fetch", "package"))
    fetch["checkout"] = package["vm"] = "dev2"
    install = {
        "name": "install", "vm": "prod", "root": True,
        "run": "apt-get install -qq -y --reinstall hello-deb >/dev/null && hello-deb",
    }  # fmt: skip
    ways = {"experimental": {"channel": "experimental"}, "flow": {"flow": "four"}}
    cycles = {
        name: [
            fetch, package, {"name": "publish", "publish": "debs", **way},
            {"name": "use", "use": "debs", "vm": "prod", **way}, install,
        ]
        for name, way in ways.items()
    }  # fmt: skip
    paths = {name: tmp_path / f"{name}.yaml" for name in cycles}
    for name, steps in cycles.items():
        text = {**ours, "source": farm["source"], "repositories": {"debs": {"format": "deb"}}}
        paths[name].write_text(yaml.safe_dump({**text, "cycle": {"steps": steps}}))
    channel = str(paths["experimental"])
    assert place("adopt", "--farm", channel).returncode == 0
    built = place.json("cycle", "--from", "fetch", "--farm", channel)  # on the VMs as they are
    assert built["result"] == "passed", built
    (used,) = built["repositories"]
    assert (used["vm"], used["channel"], used["generation"]) == ("prod", "experimental", 1)
    why = place.json("repo-why", "--package", "hello-deb", "--farm", channel)
    assert why["packages"][0]["build"] == built["id"]
    again = place.json("cycle", "--from", "fetch", "--like", built["id"], "--farm", channel)
    assert again["repositories"][0]["generation"] == 1
    assert place("adopt").returncode == 0


def test_clean_has_what_a_script_did(demo: dict[str, Any], place: Place, tmp_path: Path) -> None:
    """The guest goes back to its template, is changed, kept, and answers from that; a cycle begins
    there, and its record tells what that is."""
    script = tmp_path / "ca.sh"
    script.write_text("#!/bin/bash\n[[ $(id -u) = 0 ]] && echo 'a CA' >/etc/company-ca\n")
    refused = place("clean", "prod", "--packages", "ccache")
    assert (refused.returncode, "prod has no network" in refused.stderr) == (69, True)
    done = place.json("clean", "prod", "--script", str(script))
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    assert done["facts"]["vms"]["prod"]["script_sha256"] == digest
    built = place.json("cycle", "--only", "reset-prod")
    (prod,) = [vm for vm in built["vms"] if vm["vm"] == "prod"]
    assert (prod["checkpoint"], prod["pristine"]) == ("clean-1-of-base-1", True)
    assert (prod["tools"]["script"], prod["tools"]["script_sha256"]) == (str(script), digest)
    assert "(base@1 with what ca.sh did)" in Path(built["page"]).read_text()
    there = place("ssh", "prod", "--", "cat", "/etc/company-ca")
    assert there.stdout == "a CA\n", there.stderr
    assert "prod: its clean is base@1 with what ca.sh did" in place("status").stdout


def readme_lines() -> list[str]:
    """What "Your first farm" says to type."""
    _, _, rest = (ROOT / "README.md").read_text().partition("\n## Your first farm\n")
    lines = rest.partition("\n## ")[0].splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith("    ")]


def files_of(tree: Path) -> set[Path]:
    return {path for path in tree.rglob("*") if "__pycache__" not in path.parts}


def test_your_first_farm_line_by_line_from_an_installed_copy(
    demo: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    """README's lines as they stand there, in a directory elsewhere; the copy has no .git, and nothing is
    written to it."""
    copy = tmp_path / "opt" / "farmhand"
    copytree(ROOT, copy, symlinks=True, ignore=ignore_patterns(".git", "__pycache__", ".*_cache"))
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():  # one of them is to /dev/null
            path.chmod(path.stat().st_mode & ~0o222)
    before = files_of(copy)
    here = tmp_path / "elsewhere"
    here.mkdir()
    for name in ("invoke", "inventory"):
        (here / name).symlink_to(copy / name)
    lines = readme_lines()
    assert [line.split()[1] for line in lines] == [
        "'s/^farm:", "doctor", "clone-farm", "cycle", "ssh", "reset",
    ]  # fmt: skip
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=here, env=place.environment, input="kata 2026\n",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        if "doctor" in line:
            assert re.search(r"^ok +source +.*farmhand/examples/kata", done.stdout, re.M), done.stdout
        if " ssh " in line:
            assert "MMXXVI" in done.stdout
    assert files_of(copy) == before
    mine = ("--farm", str(here / "farm.yaml"))
    done = place("ssh", *mine, "--vm", "prod", "--command", "command -v kata || echo gone")
    assert done.stdout.strip() == "gone", done.stdout + done.stderr
    done = place("destroy", *mine, "--all", "--purge", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr


def test_destroy_leaves_nothing(demo: dict[str, Any], place: Place) -> None:
    assert place.processes()
    assert "kept" in place("demo", "--destroy").stdout
    assert place.processes() == []
    assert not (place.state / "farms" / "kata").exists()
    assert not any(place.runtime.iterdir()) if place.runtime.exists() else True
