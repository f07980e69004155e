"""Small real rpm packages, made by rpmbuild once and kept: the same bytes each time."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from host.paths import cache_dir
from host.run import which

_EPOCH = "1795176000"
_DEFINES = {
    "_buildhost": "builder.example",
    "use_source_date_epoch_as_buildtime": "1",
    "clamp_mtime_to_source_date_epoch": "1",
    "_build_id_links": "none",
    "debug_package": "%{nil}",
}


def rpm(
    name: str = "hello",
    version: str = "1.0",
    release: str = "1",
    *,
    tags: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
    defines: Mapping[str, str] | None = None,
    source: bool = False,
) -> Path:
    """One called NAME-VERSION-RELEASE.ARCHITECTURE.rpm. ``tags``: more of the spec file's, or others.
    ``files``: their text, by their paths. ``sections``: more of the spec file's."""
    given = {"Name": name, "Version": version, "Release": release, "Summary": f"{name} for tests",
             "License": "MIT", "BuildArch": "noarch", **(tags or {})}  # fmt: skip
    put = {f"/usr/share/{name}/version": f"{version}\n"} if files is None else files
    install = "".join(
        f"mkdir -p '%{{buildroot}}{Path(path).parent}'\nprintf %s '{text}' >'%{{buildroot}}{path}'\n"
        for path, text in put.items()
    )
    spec = (
        "".join(f"{tag}: {value}\n" for tag, value in given.items())
        + f"%description\n{name}\n%install\n{install}%files\n"
        + "".join(f'"{path}"\n' for path in put)
        + "\n".join(("", *sections, ""))
    )
    settings = {**_DEFINES, **(defines or {})}
    recipe = hashlib.sha256(repr((spec, sorted(settings.items()), source)).encode()).hexdigest()[:20]
    kept = cache_dir() / "tests" / "rpms" / recipe
    if not kept.exists():
        _build(spec, settings, kept, "-bs" if source else "-bb")
    (found,) = kept.glob("*.rpm")
    return found


def _build(spec: str, settings: Mapping[str, str], kept: Path, what: str) -> None:
    assert which("rpmbuild"), "these tests need rpmbuild: apt-get install rpm"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
        work = Path(directory)
        (work / "it.spec").write_text(spec)
        defines = [f"--define={key} {value}" for key, value in settings.items()]
        done = subprocess.run(
            ["rpmbuild", what, f"--define=_topdir {work}", *defines, work / "it.spec"],
            env={"PATH": "/usr/bin:/bin", "HOME": directory, "SOURCE_DATE_EPOCH": _EPOCH, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (package,) = (p for top in ("RPMS", "SRPMS") for p in (work / top).rglob("*.rpm"))
        ready = work / "ready"
        ready.mkdir()
        package.rename(ready / package.name)
        try:
            ready.rename(kept)
        except OSError:
            assert kept.exists()  # another run was first
