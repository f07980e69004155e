"""Two experimental flows at once, on the demo's VMs with their own apt. One passes; the other fails, is
halved until its guilty package has a name, and passes without it on what the first one made.

Seven minutes and more where the guests are emulated, so ./invoke test leaves it out:
./invoke test --only tests/system/test_flows_on_vms.py
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml
from test_demo import ROOT, Place

from tests.debs import deb, fields

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

PARTS = [f"part-{letter}" for letter in "abcdefgh"]
GUILTY = "part-f"
MORE_RUNS = 3
"""ceil(log2 8): until it is named; one more tells that it fails alone."""

# What there is of it is installed, and all that is installed runs.
TEST_PARTS = """
apt-get install -y -q suite $(apt-cache pkgnames part-)
for part in $(ls /usr/lib/suite); do echo "runs $part"; sh "/usr/lib/suite/$part"; done
apt-cache policy parser | sed -n 's/.*Candidate: /parser is /p'
"""
TEST_PARSER = """
test "$(apt-cache pkgnames part-)" = "" # of the other flow it knows nothing
apt-get install -y -q parser
sh /usr/lib/parser/run
"""


def make(directory: Path, name: str, version: str, path: str, script: str, more: str = "") -> Path:
    """A package of one script."""
    file = directory / f"{name}_{version}_all.deb"
    file.write_bytes(deb(fields(name, version, "all", more), {path: script.encode()}))
    return file


@dataclass
class Flows(Place):
    """The demo's farm with a repository and a cycle that tests one flow on one VM. ``used``: the
    generations of the builds, as they came."""

    directory: Path
    used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.directory)
        self.file = self.directory / "farm.yaml"
        self._farm = yaml.safe_load((ROOT / "inventory" / "default.yaml").read_text())
        del self._farm["source"]
        self._farm["farm"] = "flows"
        for vm in self._farm["vms"].values():
            vm |= {"memory": "384M"}
            vm.pop("idle_memory", None)
        self._farm["repositories"] = {"debs": {"format": "deb", "channels": ["experimental", "tested"]}}
        self.says("parser", "dev2", TEST_PARSER)

    def says(self, flow: str, vm: str, script: str) -> None:
        """The farm file's cycle."""
        steps = [
            {"name": "reset", "reset": vm},
            {"name": "candidate", "use": "debs", "vm": vm, "flow": flow},
            {"name": "test", "vm": vm, "root": True, "timeout": "5m", "run": f"set -e\n{script}"},
        ]
        self.file.write_text(yaml.safe_dump({**self._farm, "cycle": {"steps": steps}}))

    def __call__(self, *words: str) -> Any:
        return super().__call__(*words, "--farm", str(self.file))

    def facts(self, *words: str) -> dict[str, Any]:
        """What an operation of these words hands back."""
        found = self.json(*words)["facts"]
        assert isinstance(found, dict)
        return found

    def begin(self, flow: str, paths: Sequence[Path]) -> dict[str, Any]:
        return self.facts("flow-begin", "--flow", flow, *(w for p in paths for w in ("--path", str(p))))

    def shown(self, flow: str) -> dict[str, Any]:
        return self.json("flow-show", "--flow", flow)

    def head(self) -> int:
        return int(self.json("repo-show", "--which", "tested")["generation"])

    def tested(self, flow: str, vm: str, script: str) -> tuple[bool, str, str]:
        """A real cycle: the VM is reset, gets exactly the generation that is to be tested, and tests it.
        Whether it passed, the test's log, and the build."""
        self.says(flow, vm, script)
        wanted = self.shown(flow)["to_test"]
        done = self("cycle")
        record = self.json("log")
        (one,) = record["repositories"]
        assert (one["vm"], one["generation"]) == (vm, wanted), done.stderr
        (machine,) = record["vms"]
        assert machine["pristine"] is True
        log = Path(record["record"]).with_name(record["steps"][-1]["log"])
        self.used.append(wanted)
        passed = record["result"] == "passed"
        assert (done.returncode == 0) is passed, done.stderr
        assert passed or record["steps"][-1]["status"] == "failed", done.stderr
        return passed, log.read_text(), record["id"]

    def halved(self) -> dict[str, Any]:
        """The last build's verdict, and what that leads to."""
        return self.facts("flow-bisect", "--flow", "batch", "--build", "last")


@pytest.fixture(scope="module")
def flows() -> Iterator[Flows]:
    directory = Path(tempfile.mkdtemp(prefix="fhw"))
    directory.chmod(0o711)  # QEMU runs as another user and passes through
    made = Flows(directory)
    try:
        yield made
    finally:
        made("destroy", "--all", "--purge", "--yes")
        rmtree(directory, ignore_errors=True)


def test_one_passes_and_the_other_is_halved_and_put_onto_it(flows: Flows, tmp_path: Path) -> None:
    suite = make(tmp_path, "suite", "1.0", "usr/share/suite/about", "runs its parts\n")
    old = make(tmp_path, "parser", "1.0", "usr/lib/parser/run", "echo parser 1.0\n")
    flows.json("repo-add", "--channel", "tested", "--path", str(suite), "--path", str(old))
    lib = make(tmp_path, "libparser2", "2.0", "usr/lib/parser/words", "echo parsed by 2.0\n")
    new = make(
        tmp_path, "parser", "2.0", "usr/lib/parser/run", ". /usr/lib/parser/words\n",
        "Depends: libparser2 (= 2.0)\n",
    )  # fmt: skip
    parts = [
        make(
            tmp_path, name, "1.0", f"usr/lib/suite/{name}",
            "echo broken >&2; exit 3\n" if name == GUILTY else f"echo {name} is well\n",
            "Depends: suite\n",
        )
        for name in PARTS
    ]  # fmt: skip
    flows.json("clone-farm")
    first = flows.begin("parser", [new, lib])
    second = flows.begin("batch", parts)
    assert first["base"] == second["base"] == flows.head()
    assert first["generation"] != second["generation"]

    # Both are tested, each on its own candidate.
    passed, log, good = flows.tested("parser", "dev2", TEST_PARSER)
    assert passed and "parsed by 2.0" in log, log
    passed, log, _ = flows.tested("batch", "prod", TEST_PARTS)
    assert not passed and "broken" in log, log
    assert flows.used == [first["generation"], second["generation"]]
    refused = flows("flow-pass", "--flow", "batch", "--build", "last")
    assert refused.returncode == 1 and "did not pass" in refused.stderr, refused.stderr

    # The one passes, while the other is halved, on what both began with.
    found = flows.halved()
    assert found["runs"] == MORE_RUNS
    done = flows.facts("flow-pass", "--flow", "parser", "--build", good)
    assert (done["state"], done["generation"]) == ("passed", flows.head())
    runs = 0
    while "fails" not in found:
        assert runs < MORE_RUNS or found["named"] == [GUILTY]
        passed, log, _ = flows.tested("batch", "prod", TEST_PARTS)
        assert passed is ("runs part-f" not in log), log
        assert not passed or "parser is 1.0" in log, "what was published meanwhile isn't there"
        found = flows.halved()
        runs += 1
    assert found["fails"] == [f"{GUILTY} 1.0 all"] and "together" not in found
    assert runs <= MORE_RUNS + 1, "and alone"
    assert [package["name"] for package in flows.shown("batch")["fail"]] == [GUILTY]

    # It passes without that one, on what the other has made of the channel.
    moved = flows("flow-pass", "--flow", "batch", "--note", "all but one were well")
    assert moved.returncode == 1, moved.stdout
    assert re.search(r"tested moved to generation \d+ meanwhile", moved.stderr), moved.stderr
    again = flows.shown("batch")
    assert again["base"] == flows.head() and again["to_test"] not in flows.used
    passed, log, _ = flows.tested("batch", "prod", TEST_PARTS)
    assert passed and "parser is 2.0" in log, log
    assert re.findall(r"runs (part-.)", log) == [name for name in PARTS if name != GUILTY]
    flows.json("flow-pass", "--flow", "batch", "--build", "last")
    names = {p["name"] for p in flows.json("repo-list", "--which", "tested")["packages"]}
    assert names == {"suite", "parser", "libparser2", *PARTS} - {GUILTY}
    assert flows.json("flow-list")["flows"] == []
    flows.json("repo-fsck")
