"""What an agent is made of, as a zip file in memory, and the line of Python that runs it over there
without writing it to a disk (memfd_create(2), zipimport)."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

_TOP = Path(__file__).resolve().parents[2]
_FILES = (
    *(f"inventory/{name}.py" for name in ("__init__", "endings", "errors", "sizes")),
    "host/*.py",
    *(
        f"hypervisors/{name}.py"
        for name in ("__init__", "answers", "api", "console_log", "look", "marks", "ownership")
    ),
    *(f"hypervisors/{room}/**/*.py" for room in ("disks", "far", "libvirt")),
    "hypervisors/disks/zfs/*.lua",
)
_AT_HOME = ("host.py", "*_host.py", "section.py")  # what reads a farm file
_NEEDED = (3, 11)  # StrEnum, hashlib.file_digest
BOOT = (
    "import os, sys\n"
    f"if sys.version_info < {_NEEDED}: sys.exit('farmhand needs Python {_NEEDED[0]}.{_NEEDED[1]} there, "
    "it is ' + sys.version.split()[0])\n"
    "parcel = os.memfd_create('farmhand')\n"
    "with open(parcel, 'wb', closefd=False) as file:\n"
    " file.write(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))\n"
    "sys.path.insert(0, f'/proc/self/fd/{parcel}')\n"
    "import hypervisors.far.main\n"
    "hypervisors.far.main.main()\n"
)
"""First comes the parcel's length, a line, then the parcel; then frames."""
COMMAND = ("python3", "-I", "-c", BOOT)


@functools.cache
def parcel() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for pattern in _FILES:
            for path in sorted(_TOP.glob(pattern)):
                if not any(map(path.match, _AT_HOME)):
                    name = zipfile.ZipInfo(str(path.relative_to(_TOP)))  # at no time: always the same
                    file.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return target.getvalue()
