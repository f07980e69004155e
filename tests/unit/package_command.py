"""The command line, with the stand-in of ``package_lab`` for what is in a builder."""

from __future__ import annotations

import runpy
import sys

from builds.packages import in_vm
from builds.packages import plan as planning
from tests.unit.package_lab import ROOT, PlainFormat

for module in (planning, in_vm):
    module.build_format = lambda _name: PlainFormat()
start = ROOT / "cli" / "start.py"
sys.argv = [str(start), "--search-root", str(ROOT), *sys.argv[1:]]
runpy.run_path(str(start), run_name="__main__")
