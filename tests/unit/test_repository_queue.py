"""repo-queue: what is uploaded goes in, or is refused; nobody's keys are not everybody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.many_packages import make_debs
from tests.unit.cli_farm import CommandLine

FARM = """
farm: try
templates: {{base: {{build: debian-12}}}}
vms: {{prod: {{}}}}
repositories:
  debs:
    {{format: deb, path: {top}/debs, channels: [experimental], incoming: {top}/incoming{more}}}
"""


def queue(tmp_path: Path, more: str = "") -> CommandLine:
    (tmp_path / "r").mkdir(exist_ok=True)
    (tmp_path / "incoming" / "experimental").mkdir(parents=True)
    line = CommandLine(tmp_path, tmp_path / "r")
    line.farm.write_text(FARM.format(top=tmp_path, more=more))
    return line


@pytest.mark.parametrize("keys", [None, b"", b"\n"])
def test_without_a_key_of_an_uploader_nothing_is_taken(tmp_path: Path, keys: bytes | None) -> None:
    line = queue(tmp_path, ", uploaders: uploaders.gpg")
    if keys is not None:
        (tmp_path / "uploaders.gpg").write_bytes(keys)
    [path] = make_debs(tmp_path / "incoming" / "experimental", ["hello"], "1.0")
    done = line("repo-queue")
    assert done.status == 1
    assert "uploaders.gpg" in done.err
    assert "Traceback" not in done.err and "defect" not in done.err
    assert path.exists()
    assert not list((tmp_path / "debs").glob("pool/*/*"))
