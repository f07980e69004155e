"""A thousand source packages: read from debian/control, and put in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from builds.packages.archive import KnownPackages
from builds.packages.control import control_of_source
from builds.packages.graph import Graph, SourcePackage, graph_of
from builds.packages.relations import BuildTarget
from tests.figures import Figure, timed

MANY = 1000
LIMIT = 2.0
"""Seconds, for that many."""
ARCHIVE = KnownPackages({"debhelper-compat": ("13",), "pkgconf": ("1.8.1-1",), "python3": ("3.11.2",)})
_CONTROL = """\
Source: lib{n:04}
Section: libs
Priority: optional
Maintainer: Some Body <some@example.org>
# what it is built with
Build-Depends: debhelper-compat (= 13),
 pkgconf | pkg-config (>= 0.29){wanted},
Build-Depends-Indep: python3:any <!nodoc>,
Standards-Version: 4.6.2
Rules-Requires-Root: no

Package: lib{n:04}-dev
Section: libdevel
Architecture: any
Multi-Arch: same
Provides: lib{n:04}-api (= ${{binary:Version}})
Depends: lib{n:04}-1 (= ${{binary:Version}}), ${{misc:Depends}}{run}
Description: development files of library {n}
 They are needed to build what uses it.
 .
 More is said in its documentation.

Package: lib{n:04}-1
Architecture: linux-any
Depends: ${{shlibs:Depends}}, ${{misc:Depends}}
Description: library {n}
 It is used by others.

Package: lib{n:04}-doc
Architecture: all
Build-Profiles: <!nodoc>
Depends: ${{misc:Depends}}
Description: documentation of library {n}
 It is to be read.
"""


def control(number: int) -> bytes:
    """Of a package that needs up to twelve that were before it, one by a virtual name."""
    before = sorted({number * part // 12 for part in range(1, 12)} - {number})
    wanted = [f"lib{n:04}-dev (>= 1.0~rc1) [linux-any !armhf]" for n in before]
    wanted += [f"lib{number // 3:04}-api (>= 1.0)"] if number else []
    run = [f"lib{n:04}-dev" for n in before[-3:]]
    lists = {"wanted": wanted, "run": run}
    more = {name: "".join(f",\n {one}" for one in names) for name, names in lists.items()}
    return _CONTROL.format(n=number, **more).encode()


def ordered(texts: Iterator[bytes]) -> Graph:
    """From what is in their files to their schedule."""
    packages = [
        SourcePackage(control_of_source(text, f"package {n}"), "1.0-1") for n, text in enumerate(texts)
    ]
    graph = graph_of(packages, BuildTarget("amd64"), ARCHIVE)
    graph.schedule()
    return graph


def measure(place: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    say(f"{MANY} source packages: read and ordered")
    for number in range(MANY):
        (place / f"{number:04}").write_bytes(control(number))
    files = sorted(place.iterdir())

    def work() -> None:
        graph = ordered(path.read_bytes() for path in files)
        assert len(graph.builds) == MANY

    seconds = tuple(timed(work) for _ in range(rounds))
    yield Figure(f"{MANY} source packages: read and ordered", seconds, LIMIT)
