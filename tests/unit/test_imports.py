"""Who may import whom, as design.md has it: a higher part may use a lower one, never the other way."""

from __future__ import annotations

import ast
import io
import re
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hypervisors.drivers import DRIVERS

ROOT = Path(__file__).resolve().parents[2]
# From the top down. Each may import what stands below it (and its own).
ORDER = (
    "installed",
    "tasks",
    "cli",
    "builds",
    "provision",
    "repositories",
    "hypervisors",
    "host",
    "inventory",
)
STARTERS = {"subprocess", "pty", "multiprocessing"}
# Files above hypervisors/ that may start programs, and why.
MAY_START = {
    "cli/terminal.py": "replaces itself with ssh or a console: the terminal is handed over",
    "provision/network/_staged.py": "a program by itself, which becomes a daemon's checker",
}
# Imported by every command, --list included: what they import at the top must be light.
LIGHT = (
    "tasks.py",
    "cli/command.py",
    "cli/options.py",
    "cli/run.py",
    "cli/start.py",
    "cli/streams.py",
    "cli/terminal.py",
    "cli/views.py",
    "cli/words.py",
    "provision/engine/report.py",
)
HEAVY = {
    "asyncssh",
    "asyncio",
    "jinja2",
    "pydantic",
    "libvirt",
    "cryptography",
    "dns",
    "sqlite3",
    "yaml",
    "hypothesis",
}

_IMPORT = re.compile(
    r"^\s*(?:import|from) ((?:[a-z_]\w*)(?:\.\w+)*)(?= import |\s*(?:[,;\n]|$| as ))", re.M
)

SOURCES = [
    *sorted(path.relative_to(ROOT) for top in ORDER for path in (ROOT / top).rglob("*.py")),
    Path("tasks.py"),
]
# Of a farm file that hasn't changed: needs neither pydantic nor YAML.
LIGHT_FARM = (
    "inventory/model.py",
    "inventory/plain.py",
    "provision/farm_cache.py",
    "provision/site.py",
    "builds/step_kind.py",
    *(str(path) for path in SOURCES if path.match("builds/steps/*.py")),
)


def part(module: str) -> str | None:
    top = module.partition(".")[0]
    return top if top in ORDER else None


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def imports_in_strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Of programs that are sent to another interpreter as text: lines of a string that import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for match in _IMPORT.finditer(node.value):
                yield match[1], node.lineno


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path: Path) -> None:
    own = ORDER.index(part(path.parts[0].removesuffix(".py")) or "")
    tree = parse(path)
    for module, line in [*imports(tree), *imports_in_strings(tree)]:
        other = part(module)
        assert other is None or ORDER.index(other) >= own, (
            f"{path}:{line} imports {module}, which is above it"
        )


def test_no_files_import_each_other_in_a_circle() -> None:
    """Neither late, in a function, nor for type checkers alone: what two files need of each other has a
    file of its own."""
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = (module for module, _ in imports(parse(path)))
        used = {m if m in files else m.rpartition(".")[0] for m in found}
        graph[name] = used & files.keys() - {name}
    assert sum(map(len, graph.values())) > len(files)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"in a circle: {' <- '.join(error.args[1])}") from None


def test_imports_in_strings_are_seen() -> None:
    tree = ast.parse('BOOT = "import sys\\n" f"{sys}" "import provision.site\\nprovision.site.x()\\n"')
    assert ("provision.site", 1) in list(imports_in_strings(tree))


def test_all_that_runs_elsewhere_is_sent_there() -> None:
    """A parcel holds whatever its own files import of ours."""
    from hypervisors.far.parcel import parcel

    with zipfile.ZipFile(io.BytesIO(parcel())) as file:
        sent = set(file.namelist())
    for name in sorted(name for name in sent if name.endswith(".py")):
        for module, line in imports(parse(Path(name))):
            if part(module) is None:
                continue
            stem = module.replace(".", "/")
            homes = {f"{stem}.py", f"{stem}/__init__.py", f"{stem.rpartition('/')[0]}.py"}
            homes.add(f"{stem.rpartition('/')[0]}/__init__.py")
            assert homes & sent, f"{name}:{line} imports {module}, which is not sent"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] != "hypervisors"], ids=str)
def test_libvirt_is_for_drivers_alone(path: Path) -> None:
    for module, line in imports(parse(path)):
        assert module.split(".")[0] not in ("libvirt", "libvirt_qemu"), f"{path}:{line}"


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.parts[0] not in ("hypervisors", "host") and str(p) not in MAY_START],
    ids=str,
)
def test_only_the_lower_rooms_start_programs(path: Path) -> None:
    tree = parse(path)
    for module, line in imports(tree):
        assert module.split(".")[0] not in STARTERS, f"{path}:{line} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            bad = node.value.id == "os" and node.attr.startswith(
                ("exec", "spawn", "posix_spawn", "fork")
            )
            bad = bad or name in ("os.system", "os.popen")
            bad = bad or name in ("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell")
            assert not bad, f"{path}:{node.lineno} calls {name}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[0] in ("hypervisors", "host", "inventory")], ids=str
)
def test_drivers_and_the_model_do_not_print(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", LIGHT + LIGHT_FARM)
def test_every_command_begins_light(path: str) -> None:
    tree = parse(Path(path))
    for node in tree.body:  # the top level only: late imports are inside functions
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module, line in imports(node):
                assert module.split(".")[0] not in HEAVY, f"{path}:{line} imports {module} at once"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[0] not in ("hypervisors", "tests")], ids=str
)
def test_what_a_driver_can_is_asked_not_its_name(path: Path) -> None:
    """It says so itself, in its ``DriverInfo``."""
    names = {*DRIVERS}
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        said = {getattr(one, "attr", getattr(one, "id", "")) for one in sides}
        constants = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
        assert not (said & {"driver", "name"} and constants & names), f"{path}:{node.lineno}"
        assert "driver" not in {getattr(one, "attr", "") for one in sides}, f"{path}:{node.lineno}"


def test_files_are_locked_by_what_host_has() -> None:
    """``host.file_lock``, or ``host.leases``; the lock of an operation has a note in its file."""
    for path in SOURCES:
        if path.parts[0] in ("hypervisors", "host") or str(path) == "provision/engine/locks.py":
            continue
        for module, line in imports(parse(path)):
            assert module != "fcntl", f"{path}:{line}"


def test_no_shell() -> None:
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(f"{path}:{node.value.lineno} uses a shell")
