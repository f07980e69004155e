"""Many small packages, made for measuring: real ones, that dpkg and rpm take."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path
from random import Random

_CONTROL = """\
Package: {name}
Version: {version}
Architecture: amd64
Maintainer: A Maintainer <maintainer@example.org>
Installed-Size: 12
Depends: libc6 (>= 2.36), other-{name} (= 1.2)
Section: misc
Priority: optional
Homepage: https://example.org/{name}
Description: a package made for measuring
 It has a long description, as packages have, in several lines,
 so that an index of many of them is as large as a real one.
"""
_SPEC = """\
Name: {run}
Version: {version}
Release: 1
Summary: many packages
License: GPL
BuildArch: noarch
%description
Many.
{packages}"""
_PACKAGE = """\
%package -n {name}
Summary: a package made for measuring
Requires: other-{name} >= 1.2
%description -n {name}
It has a long description, as packages have, in several lines,
so that an index of many of them is as large as a real one.
%files -n {name}
"""
_RUN = 1000  # packages of one spec


def names(count: int) -> list[str]:
    return [f"pkg{number:05d}" for number in range(count)]


def make_debs(directory: Path, wanted: list[str], version: str, size: int = 0) -> list[Path]:
    """As dpkg-deb writes them, in a thousandth of the time. ``size``: bytes in each that can't be
    compressed."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name in wanted:
        text = f"{name} {version}\n".encode() + Random(name).randbytes(size)
        control = _CONTROL.format(name=name, version=version).encode()
        members = (
            ("debian-binary", b"2.0\n"),
            ("control.tar.gz", _tar({"./control": control})),
            ("data.tar.gz", _tar({f"./usr/share/{name}/text": text})),
        )
        path = directory / f"{name}_{version}_amd64.deb"
        path.write_bytes(b"!<arch>\n" + b"".join(_member(*member) for member in members))
        made.append(path)
    return made


def make_rpms(directory: Path, wanted: list[str], version: str) -> list[Path]:
    """By rpmbuild, a thousand of one spec."""
    directory.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(wanted), _RUN):
        run = wanted[start : start + _RUN]
        spec = directory / "many.spec"
        packages = "".join(_PACKAGE.format(name=name) for name in run)
        spec.write_text(_SPEC.format(run=f"many{start}", version=version, packages=packages))
        defines = {
            "_topdir": directory / "build", "_rpmdir": directory, "_buildshell": "/bin/bash",
            "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
            "use_source_date_epoch_as_buildtime": "1", "_buildhost": "measuring",
        }  # fmt: skip
        words = [word for key, value in defines.items() for word in ("--define", f"{key} {value}")]
        subprocess.run(["rpmbuild", "--quiet", "-bb", *words, spec], check=True, capture_output=True)
        spec.unlink()
    return [directory / f"{name}-{version}-1.noarch.rpm" for name in wanted]


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        top = tarfile.TarInfo("./")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), 1, mtime=0)


def _member(name: str, data: bytes) -> bytes:
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
    return head.encode() + data + b"\n" * (len(data) % 2)
