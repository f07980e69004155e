"""Runs `build`, or another operation on packages, in a process of its own that kills itself at a point:
FARM_FILE POINT REQUEST (JSON) [OPERATION].

What a point is, and POINT 0: as in ``repo_child``. The builders' inside is the stand-in of
``package_lab``."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from repo_child import Points

import cli.composition  # noqa: F401 - what there is
from builds.packages import in_vm
from builds.packages import plan as planning
from inventory.errors import FarmhandError
from inventory.loader import load
from provision.engine.registry import operation
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.site import Site
from tests.unit.package_lab import PlainFormat


def main(file: str, at: str, request: str, name: str = "build") -> int:
    for module in (planning, in_vm):
        module.build_format = lambda _name: PlainFormat()
    points = Points(int(at), "kill")
    points.wrap()
    try:
        with Site(load(Path(file)), reporter=QuietReporter()) as site:
            points.armed = True
            perform(site, operation(name)(**json.loads(request)))
            points.armed = False
    except FarmhandError as error:
        print(type(error).__name__, error.message)
        return 2
    except BaseException:  # noqa: BLE001 - a child tells all
        traceback.print_exc()
        return 1
    print(points.seen)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
