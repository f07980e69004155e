"""Loading what is right: the shipped farms, defaults, YAML's traps, the Autobuild cycle, the files that
are made from the model."""

import ast
import json
import os
import re
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import get_args

import pytest

from builds.steps.checkout import CheckoutStep
from builds.steps.reset import ResetStep
from builds.steps.run import RunStep
from builds.steps.transfer import TransferStep
from inventory.annotations import hints
from inventory.errors import InventoryError
from inventory.loader import default_cycle, load, loads, place, resolve
from inventory.model import Farm, Source
from inventory.packages import PackageBuilds
from inventory.schema import render

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "inventory").glob("*.yaml"))
STEPS = [
    "reset-dev2", "reset-prod", "fetch", "build-dev", "install-dev", "build-prod", "transfer",
    "install-prod",
]  # fmt: skip


def farm(text: str) -> Farm:
    return loads(text.encode(), Path("f.yaml"))


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_first_farm_that_we_tell_to_make_is_not_the_demos(page: str, tmp_path: Path) -> None:
    """Else it would be refused as soon as it is edited."""
    (tmp_path / "inventory").symlink_to(ROOT / "inventory")
    text = (ROOT / page).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("    ") and ">farm.yaml" in line)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert load(tmp_path / "farm.yaml").farm != load(ROOT / "inventory/default.yaml").farm


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_farms_load(path: Path) -> None:
    loaded = load(path)
    assert loaded.path == path
    assert loaded.cycle is not None or loaded.build is not None
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert first == "# yaml-language-server: $schema=farm.schema.json"


def test_what_ships() -> None:
    names = {path.stem for path in SHIPPED}
    hello = {"hello-deb", "hello-make", "hello-rpm"}
    assert names == {"default", "aleksi", "nomovok", "gallifrey", "packages", "ssh-only"} | hello


def test_default_farm() -> None:
    loaded = load(ROOT / "inventory" / "default.yaml")
    assert list(loaded.vms) == ["dev2", "prod"]
    assert [loaded.hostname_of(vm) for vm in loaded.vms] == ["ab-kata-dev2", "ab-kata-prod"]
    assert [loaded.machine_of(vm) for vm in loaded.vms] == ["kata-dev2", "kata-prod"]
    assert (loaded.host_of("prod"), loaded.template_of("prod")) == ("here", "base")
    assert (loaded.vms["dev2"].memory, loaded.vms["dev2"].idle_memory) == (2**30, 2**29)
    assert loaded.cycle is not None
    assert [step.name for step in loaded.cycle.steps] == STEPS
    assert loaded.cycle == default_cycle()
    assert loaded.source is not None
    assert loaded.source.example == "kata"


def test_examples_are_found_wherever_the_farm_file_lies(tmp_path: Path) -> None:
    """README: cp inventory/default.yaml farm.yaml. No shipped farm's source depends on where it is."""
    found: dict[str, Path | None] = {}
    for shipped in SHIPPED:
        copy = tmp_path / shipped.name
        copy.write_bytes(shipped.read_bytes())
        loaded = load(copy)
        if loaded.build is not None:
            found[shipped.stem] = loaded.build.sources
            continue
        source = loaded.source
        assert source is not None
        assert source.example or source.place.startswith(("https://", "~"))
        found[shipped.stem] = Path(source.place)
    assert found["default"] == ROOT / "examples" / "kata"
    assert found["hello-deb"] == ROOT / "examples" / "hello-deb"
    assert found["packages"] == ROOT / "examples" / "packages" / "deb"
    for section, directory in ((Source, ROOT / "examples"), (PackageBuilds, ROOT / "examples/packages")):
        known = get_args(get_args(hints(section)["example"])[0])
        there = {path.name for path in directory.iterdir() if path.is_dir()}
        assert {*known} == there - {"packages"}


def test_where_the_file_says_something(tmp_path: Path) -> None:
    path = tmp_path / "farm.yaml"
    farm_ = "farm: a\nvms: {b: {}}\ntemplates: {t: {build: x}}\n"
    path.write_text(f"{farm_}source:\n  # of ours\n  repository: nowhere\n")
    loaded = load(path)
    assert place(loaded, "source", "repository") == f"{path}:6:15"
    assert place(loaded, "source", "revision") == f"{path}:4:1"
    path.unlink()
    assert place(loaded, "source") == str(path)


def test_gallifrey_is_the_articles() -> None:
    loaded = load(ROOT / "inventory" / "gallifrey.yaml")
    dev = loaded.vms["gallifrey-dev"]
    assert (dev.mac, dev.address, dev.nat_port) == (
        "52:54:86:b3:3f:10",
        IPv4Address("10.10.60.6"),
        22006,
    )
    assert (dev.memory, dev.idle_memory) == (4 * 2**30, 2**30)
    assert loaded.network.subnet == IPv4Network("10.10.60.0/24")
    assert loaded.network.reserved_ranges == (
        (IPv4Address("10.10.60.200"), IPv4Address("10.10.60.254")),
    )


def test_over_ssh_without_a_reset_command_there_is_no_reset_step() -> None:
    loaded = load(ROOT / "inventory" / "ssh-only.yaml")
    assert loaded.cycle is not None
    assert [step.name for step in loaded.cycle.steps] == [s for s in STEPS if s != "reset-prod"]
    assert loaded.template_of("dev2") is None


def test_values_are_what_was_written() -> None:
    loaded = farm(
        """\
farm: 22
network: {internet: on, domain: no.example}
templates: {t: {build: 022, packages: [1e3]}}
vms:
  a: {mac: 12:34:56:12:34:56, start: off, hostname: 1e3, memory: 536870912}
  on: {aliases: 1-1, memory: 1.5g}
  b:
ssh: {users: {007: [keys/bond.pub]}, ready_timeout: 1h30m}
source: {repository: ~/src, revision: 052525}
cycle:
  steps:
    - {name: on, reset: on, timeout: 90}
    - {name: 1-1, vm: a, run: 12:34}
"""
    )
    assert loaded.farm == "22"
    assert loaded.network.internet is True
    assert loaded.templates["t"].build == "022"
    assert loaded.templates["t"].packages == ("1e3",)
    assert (loaded.vms["a"].mac, loaded.vms["a"].start) == ("12:34:56:12:34:56", False)
    assert (loaded.vms["a"].hostname, loaded.vms["a"].memory) == ("1e3", 2**29)
    assert (loaded.vms["on"].aliases, loaded.vms["on"].memory) == (("1-1",), 3 * 2**29)
    assert loaded.vms["b"] == type(loaded.vms["b"])()
    assert loaded.ssh.users == {"007": ("keys/bond.pub",)}
    assert loaded.ssh.ready_timeout == 5400
    assert loaded.source is not None
    assert (loaded.source.repository, loaded.source.revision) == ("~/src", "052525")
    assert loaded.cycle is not None
    assert [(s.name, s.timeout) for s in loaded.cycle.steps] == [("on", 90), ("1-1", 1800)]
    run = loaded.cycle.steps[1]
    assert isinstance(run, RunStep)
    assert run.run == ("12:34",)


def test_byte_order_mark_crlf_and_aliases() -> None:
    loaded = loads(
        b"\xef\xbb\xbffarm: a\r\ntemplates: {t: {build: x}}\r\n"
        b"vms:\r\n  a: &small {memory: 1G}\r\n  b: *small\r\n",
        Path("f.yaml"),
    )
    assert loaded.vms["a"] == loaded.vms["b"]
    assert loaded.cycle is None


def test_a_cycle_of_its_own_stays() -> None:
    text = (
        "farm: a\ntemplates: {t: {build: x}}\nvms: {dev2: {}, prod: {}}\nsource: {repository: x}\n"
        "cycle: {steps: [{name: a, transfer: x, from: dev2, to: prod, into: /x}], keep_records: 3}\n"
    )
    cycle = farm(text).cycle
    assert cycle is not None
    assert cycle.keep_records == 3
    assert isinstance(cycle.steps[0], TransferStep)
    assert (cycle.steps[0].source, cycle.steps[0].transfer) == ("dev2", ("x",))


def test_paths_are_relative_to_the_farm_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "f.yaml").write_text("farm: a\ntemplates: {t: {build: x}}\nvms: {a: {}}\n")
    monkeypatch.chdir(tmp_path)
    loaded = load(Path("f.yaml"))
    assert loaded.path == tmp_path / "f.yaml"
    assert resolve(loaded.path, "keys/a.pub") == tmp_path / "keys" / "a.pub"
    assert resolve(loaded.path, Path("/etc/x")) == Path("/etc/x")
    assert resolve(loaded.path, "~/x") == Path("/home/somebody/x")


def test_default_cycle_over_other_vms() -> None:
    cycle = default_cycle("build1", "run1")
    assert [step.name for step in cycle.steps][:2] == ["reset-build1", "reset-run1"]
    assert {step.vm for step in cycle.steps if isinstance(step, RunStep)} == {"build1", "run1"}
    assert [step.to for step in cycle.steps if isinstance(step, ResetStep)] == [None, None]


def test_made_files_are_up_to_date() -> None:
    for path, text in render().items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m cli.schema"


def test_every_key_is_explained() -> None:
    schema = json.loads((ROOT / "inventory" / "farm.schema.json").read_text(encoding="utf-8"))
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for key, value in part["properties"].items():
            assert value["description"], key
    assert "copy" in schema["$defs"]["DiskStore"]["properties"]
    assert "import" in schema["$defs"]["TemplateSource"]["properties"]
    assert "from" in schema["$defs"]["TransferStep"]["properties"]


def test_schema_takes_what_yaml_makes_of_values() -> None:
    """An editor reads ``memory: 512`` as a number and ``start: on`` as true: no false alarm."""
    definitions = json.loads((ROOT / "inventory" / "farm.schema.json").read_text("utf-8"))["$defs"]
    vm = definitions["Vm"]["properties"]
    for key in ("memory", "disk", "ssh_port", "vcpus", "hostname"):
        assert {"string"} < set(vm[key]["type"])
    assert {True, False, "yes", "no", "on", "off"} == set(vm["start"]["enum"])
    assert {
        option["type"] if isinstance(option["type"], str) else "one" for option in vm["reset"]["anyOf"]
    } == {
        "array",
        "one",
    }


def test_a_thousand_vms() -> None:
    lines = ["farm: a", "network: {mode: bridge, bridge: b, subnet: 10.0.0.0/16}"]
    lines += ["templates: {t: {build: x}}", "vms:"]
    for n in range(1, 1001):
        lines.append(f"  vm{n}:")
        lines += [f"    memory: {n}M", f"    mac: 52:54:00:00:{n >> 8:02x}:{n & 255:02x}"]
        lines += [f"    address: {IPv4Address('10.0.0.0') + n}", f"    nat_port: {20000 + n}"]
        lines += [f"    aliases: [a{n}, b{n}]"]
    loaded = farm("\n".join(lines))
    assert len(loaded.vms) == 1000
    assert loaded.vms["vm1000"].mac == "52:54:00:00:03:e8"


def test_loading_stays_light() -> None:
    """What costs time or belongs elsewhere isn't imported to load a farm that is right."""
    code = (
        "import sys, cli.composition; from pathlib import Path; from inventory.loader import load;"
        f"load(Path({str(ROOT / 'inventory' / 'default.yaml')!r}));"
        "print([m for m in ('difflib', 'inventory.explain', 'inventory.schema', 'asyncssh', 'jinja2',"
        " 'rich', 'libvirt', 'invoke', 'pydantic', 'pydantic_core.core_schema', 'inventory.annotations',"
        " 'provision.network.service') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "[]\n"


def git(directory: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example", "-c", "commit.gpgsign=false")
    argv = ["git", *identity, *words]
    return subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def test_fetch_script(tmp_path: Path) -> None:
    """First and later runs, with branches that move and go, tags, relative revisions and lost ones."""
    source, home = tmp_path / "source", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    git(source, "init", "-q", "-b", "main")
    script = next(s for s in default_cycle().steps if s.name == "fetch")
    assert isinstance(script, CheckoutStep)

    def commit(text: str) -> str:
        git(source, "commit", "-q", "--allow-empty", "-m", text)
        return git(source, "rev-parse", "HEAD")

    def fetch(revision: str) -> str:
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "GIT_REVISION": revision,
            "SOURCE_URL": source.as_uri(), "BUILD_ID": "1", "FARM": "a",
        }  # fmt: skip
        done = subprocess.run(
            ["sh", "-eu", "-c", script.scripts[0]],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip()
        match = re.fullmatch(r"source: ([0-9a-f]{40}) .*\n", done.stdout)
        assert match
        assert git(home / "src", "rev-parse", "HEAD") == match[1]
        return match[1]

    one = commit("one")
    assert [fetch("HEAD"), fetch("main"), fetch(one), fetch(one[:9])] == [one] * 4
    git(source, "tag", "v1")
    two = commit("two")
    git(source, "tag", "-a", "-m", "x", "v2")
    assert [fetch("HEAD"), fetch("HEAD~1"), fetch("v1"), fetch("v2"), fetch("v2~1")] == [
        two,
        one,
        one,
        two,
        one,
    ]
    git(source, "checkout", "-q", "-b", "feature/x")
    three = commit("three")
    assert [fetch("feature/x"), fetch("main"), fetch("HEAD")] == [three, two, three]
    git(source, "checkout", "-q", "main")
    git(source, "branch", "-q", "-D", "feature/x")
    git(source, "branch", "feature")  # where a directory of branches was
    git(source, "tag", "-f", "v1")
    git(source, "reset", "-q", "--hard", one)  # a branch set back
    assert [fetch("feature"), fetch("v1"), fetch("main"), fetch("HEAD")] == [two, two, one, one]
    assert "feature/x" in fetch("feature/x")
    loose = git(source, "commit-tree", "-m", "loose", "HEAD^{tree}")
    assert fetch(loose) == loose
    assert "couldn't find remote ref nosuch" in fetch("nosuch")


@pytest.mark.parametrize(
    "step", [s for s in default_cycle().steps if isinstance(s, RunStep)], ids=lambda s: s.name
)
def test_scripts_are_posix_shell(step: RunStep) -> None:
    for script in step.run:
        subprocess.run(["sh", "-n", "-c", script], check=True)
        assert "{{" not in script


def test_no_description_is_lost() -> None:
    """Each field of the model has its string below it in the source."""
    tree = ast.parse((ROOT / "inventory" / "model.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "Model":
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id != "_path"]  # type: ignore[union-attr]
            strings = [
                n for n in node.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
            ]
            assert len(strings) >= len(fields), node.name


def test_problems_as_data() -> None:
    with pytest.raises(InventoryError) as caught:
        farm("farm: A\nvms: {}\n")
    assert caught.value.as_dict()["problems"] == [
        {"file": "f.yaml", "line": 1, "column": 7, "message": caught.value.problems[0].message},
        {"file": "f.yaml", "line": 2, "column": 6, "message": "vms: at least one is needed"},
    ]
