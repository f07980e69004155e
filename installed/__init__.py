"""farmhand as it is installed: the one name that it takes among Python's modules.

Its own modules have short names (``host``, ``cli``, ``tasks``). They lie in a directory beside this
file, with the templates and the example farms, which is on the path of this program alone.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """The command ``farmhand``."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "_modules"))
    from cli import start

    with start.begun():
        import tasks
    start.installed(tasks)
