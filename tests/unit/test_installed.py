"""farmhand as an application: a wheel of this tree in a new environment, used from another directory."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisors.libvirt.errors import need_binding
from inventory.errors import Unsupported
from tests.unit.cli_farm import ROOT, CommandLine, command_line
from tests.unit.test_imports import ORDER

_OFFLINE = ("--disable-pip-version-check", "--no-input", "--no-index", "--no-deps", "--quiet")


def pip(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    pip("wheel", *_OFFLINE, "--no-build-isolation", "--wheel-dir", directory, ROOT)
    [made] = directory.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the wheel, and with what it requires linked in from the environment that runs the tests."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    pip("--python", place / "bin" / "python", "install", *_OFFLINE, "--no-compile", wheel)
    [packages] = place.glob("lib/python3*/site-packages")
    import pydantic

    (packages / "requirements.pth").write_text(f"{Path(pydantic.__file__).parents[1]}\n")
    assert sorted(path.name for path in packages.iterdir() if "." not in path.name) == ["farmhand"]
    return place


class Installed(CommandLine):
    """The program of that environment."""

    program: Path

    def argv(self, *words: str) -> list[str]:
        return [str(self.program), *words]


@pytest.fixture
def farmhand(environment: Path, tmp_path: Path) -> Iterator[Installed]:
    for made in command_line(tmp_path, Installed):
        made.program = environment / "bin" / "farmhand"
        yield made


def test_it_lists_what_an_admin_uses(farmhand: Installed) -> None:
    tasks = {line.split()[0] for line in farmhand("--list").out.splitlines()[2:] if line.strip()}
    assert {"doctor", "clone-farm", "reset", "cycle", "network-apply"} <= tasks
    assert not [task for task in tasks if task in ("test", "lint", "bench") or task.startswith("lab")]
    assert farmhand().out == farmhand("--list").out
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert farmhand("--version").out == f"farmhand {version}\n"


def test_a_life_of_a_farm(farmhand: Installed) -> None:
    (farmhand.directory / "farm.yaml").write_text(farmhand.farm.read_text())
    farmhand.environment["FARMHAND_FARM"] = ""  # ./farm.yaml is found by itself
    assert "not made" in farmhand("status").out
    assert farmhand("clone-farm", "--no-wait").status == 0
    assert farmhand("reset", "--vm", "prod", "--no-wait", "--json").json["changed"]
    assert "running" in farmhand("status").out
    assert farmhand("destroy", "--all").status == 0


def test_what_comes_with_it_is_found(farmhand: Installed) -> None:
    found = farmhand("status", "--json", FARMHAND_FARM="").json
    assert found["farm"] == "kata"
    modules = Path(found["file"]).parents[1]
    assert modules.name == "_modules"
    for example in sorted((modules / "inventory").glob("*.yaml")):
        assert farmhand("history", "--farm", str(example)).status == 0, example
    shown = farmhand("render", "--json", "--farm", str(modules / "inventory" / "gallifrey.yaml"))
    assert shown.status == 0, shown.err
    assert {"bind", "dhcpd"} <= {file["service"] for file in shown.json["files"]}
    looked = farmhand("doctor", "--json", FARMHAND_FARM="", FARMHAND_ACCELERATOR="tcg").json
    checks = {check["name"]: check for check in looked["checks"]}
    assert checks["source"]["ok"] and str(modules / "examples" / "kata") in checks["source"]["text"]


def test_its_words_are_its_own(farmhand: Installed) -> None:
    assert "farmhand --list shows the tasks, farmhand TASK --help its flags" in farmhand("xyzzy").err
    done = farmhand("reset", "--vm", "prod", "--json")
    assert done.err.splitlines()[-1] == "  make it: farmhand clone-farm --vm prod"
    assert done.json["calls"] == [{"task": "clone-farm", "flags": {"vm": "prod"}}]


def test_it_completes_itself(farmhand: Installed) -> None:
    script = farmhand("--print-completion-script", "bash").out
    assert f"{farmhand.program} --complete --" in script and script.endswith("complete farmhand\n")
    assert farmhand("--complete", "--", "reset", "p").out == "prod\n"
    assert "farmhand reset prod" in farmhand("--help", "reset").out


def test_it_leaves_other_modules_alone(environment: Path) -> None:
    """Names such as ``host`` and ``cli`` are on the path of its own program only."""
    probe = (
        "from importlib.util import find_spec; import farmhand;"
        f"print([name for name in {[*ORDER, 'tests']!r} if find_spec(name)])"
    )
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-P", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_all_rooms_are_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name.removeprefix("farmhand/_modules/") for name in file.namelist()}
        [metadata] = [name for name in names if name.endswith("/METADATA")]
        text = file.read(metadata).decode()
    there = [ROOT / "tasks.py"]
    for room in (*ORDER[2:], "templates", "examples"):
        there += [path for path in (ROOT / room).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in there if "__pycache__" not in path.parts}
    assert wanted <= names
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]
    required = re.findall(r"^Requires-Dist: (.*)$", text, re.M)
    lines = (ROOT / "requirements.in").read_text().splitlines()
    assert required == [line.lower() for line in lines if not line.startswith("#")]


def test_a_python_without_libvirt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(Unsupported, match="finds no module libvirt") as caught:
        need_binding()
    assert "python3-libvirt" in caught.value.remedy and "--system-site-packages" in caught.value.remedy
