"""A farm file for a project: a shipped example, with the project's own name, place and needs."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from host.files import file_error
from host.program import ROOT
from inventory.errors import Conflict, FarmhandError, Unfit
from inventory.loader import loads

_EXAMPLES = "# this example's"  # ends a line that another project has no use for
_DEFAULT = "kata"  # the default farm's name
_MOST = 2**20  # bytes of debian/control
_TEST = """\
    - name: test
      vm: {vm}
      timeout: 10m
      run: {script}
"""
_DEPTH = ("", "rpms", "rpm", "packaging", "SPECS")  # where spec files lie


@dataclass(frozen=True, slots=True)
class ProjectNeeds:
    """What a project's directory says of its build. ``spec``: the spec file's path there. ``packages``:
    Debian packages that it needs to be built and installed."""

    spec: str = ""
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProjectKind:
    """``example``: the farm file that shows it. ``look``: what a directory says, None if it is no
    project of that kind. ``without``: what is known of one that isn't on this machine. ``target``: the
    VM where it is installed."""

    name: str
    what: str
    example: str
    look: Callable[[Path], ProjectNeeds | None]
    without: ProjectNeeds = ProjectNeeds()
    target: str = "target"


_DEB_TOOLS = ("build-essential", "fakeroot")
"""What dpkg-buildpackage wants of every package: dpkg-checkbuilddeps(1)."""


def _two_level(directory: Path) -> ProjectNeeds | None:
    both = all((directory / "rpms" / f"{each}.spec").is_file() for each in ("dev", "prod"))
    return ProjectNeeds() if both else None


def _deb(directory: Path) -> ProjectNeeds | None:
    control = directory / "debian" / "control"
    return ProjectNeeds(packages=_needs(control)) if control.is_file() else None


def _needs(control: Path) -> tuple[str, ...]:
    """What a Debian package's build wants, and what is installed with it as far as its control file
    names that; the first of several that would do. debhelper-compat is no package of its own:
    debhelper(7)."""
    from builds.packages.control import control_of_source
    from builds.packages.plan import target
    from builds.packages.relations import applying

    here = target()
    try:
        with control.open("rb") as file:
            source = control_of_source(file.read(_MOST), str(control))
    except OSError as error:
        raise file_error(error, control, "read") from error
    clauses = [clause for _, clause in source.wants(here)]
    for binary in source.binaries:
        if binary.made_for(here):
            clauses += [clause for field in binary.depends.values() for clause in applying(field, here)]
    own = {binary.name for binary in source.binaries}
    names = [clause[0].name for clause in clauses if not own & {one.name for one in clause}]
    names = ["debhelper" if name == "debhelper-compat" else name for name in names]
    return tuple(dict.fromkeys((*_DEB_TOOLS, *names)))


def _rpm(directory: Path) -> ProjectNeeds | None:
    specs = [file for place in _DEPTH for file in sorted((directory / place).glob("*.spec"))]
    return ProjectNeeds(spec=str(specs[0].relative_to(directory))) if specs else None


def _make(directory: Path) -> ProjectNeeds | None:
    there = any((directory / name).is_file() for name in ("GNUmakefile", "makefile", "Makefile"))
    return ProjectNeeds() if there else None


KINDS: Mapping[str, ProjectKind] = {
    kind.name: kind
    for kind in (
        ProjectKind("autobuild", "rpms/dev.spec and rpms/prod.spec", "default", _two_level, target=""),
        ProjectKind(
            "deb", "a Debian package (debian/)", "hello-deb", _deb,
            ProjectNeeds(packages=(*_DEB_TOOLS, "debhelper")),
        ),
        ProjectKind(
            "rpm", "an rpm package (*.spec)", "hello-rpm", _rpm, ProjectNeeds(spec="package.spec")
        ),
        ProjectKind("make", "a Makefile", "hello-make", _make),
    )
}  # fmt: skip
"""In the order in which they are looked for: a Debian package has a Makefile, too."""


def kinds_of(directory: Path) -> dict[str, ProjectNeeds]:
    """What a project can be built as, the likeliest first. Unfit: its debian/control can't be read."""
    looked = ((name, kind.look(directory)) for name, kind in KINDS.items())
    return {name: found for name, found in looked if found is not None}


def farm_text(
    name: str, kind: ProjectKind, found: ProjectNeeds, source: str, out: Path, *, test: str = ""
) -> str:
    """The farm file's text. ``test``: a last step's script, where the project is installed; for a kind
    that has a ``target``. Unfit: it would not be valid, since one of these isn't."""
    example = (ROOT / "inventory" / f"{kind.example}.yaml").read_text(encoding="utf-8")
    _, _, body = example.partition("\nfarm: ")
    lines = [line for line in f"farm: {body}".split("\n") if not line.endswith(_EXAMPLES)]
    text = "\n".join(lines)
    values = {
        r"^farm: .*": f"farm: {name}",
        r"^  example: .*": f"  repository: {json.dumps(source, ensure_ascii=False)}",
        r"^        spec=.*": f"        spec={_quoted(found.spec)}",
    }
    if found.packages:
        values[r"^    packages: \[\].*"] = f"    packages: [{', '.join(found.packages)}]"
    for line, value in values.items():
        if match := re.search(line, text, re.MULTILINE):
            text = text[: match.start()] + value + text[match.end() :]
    text = re.sub(r"^source:\n(  #.*\n)+", "source:\n", text, flags=re.MULTILINE)  # of the example's
    text = text.replace(f"ab-{_DEFAULT}-", f"{name}-")
    if test:
        text += _TEST.format(vm=kind.target, script=json.dumps(test, ensure_ascii=False))
    head = (
        f"# The farm of {name}: {kind.what}. Every key is explained in docs/inventory.md, what\n"
        "# a step's script gets in docs/cycle.md; cycle --explain shows all that each step does.\n\n"
    )
    loads((head + text).encode(), out)
    return head + text


def _quoted(path: str) -> str:
    import shlex

    if not path.isprintable():
        raise Unfit(f"the spec file's name {path!r} has control characters")
    return shlex.quote(path)


def write_new(out: Path, text: str) -> None:
    """Write it where nothing is. Conflict: something is there."""
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise in_the_way(out) from None
        raise file_error(error, out, "write") from error


def in_the_way(out: Path) -> FarmhandError:
    return Conflict(f"{out} is there already: nothing is overwritten", remedy="--out ANOTHER")
