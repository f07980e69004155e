"""The command line, with the stand-in of ``package_lab`` for what is in a builder. Nothing of farmhand's
is imported before the command line itself is, which is particular about that."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_FORMATS = "builds.packages.formats"


class _StandIn(MetaPathFinder):
    """Puts it in when the table of formats is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _FORMATS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec and spec.loader
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            module.BUILD_FORMATS["deb"] = "tests.unit.package_lab:PlainFormat"

        spec.loader.exec_module = loaded
        return spec


root = Path(__file__).parents[2]
sys.meta_path.insert(0, _StandIn())
start = root / "cli" / "start.py"
sys.argv = [str(start), "--search-root", str(root), *sys.argv[1:]]
runpy.run_path(str(start), run_name="__main__")
