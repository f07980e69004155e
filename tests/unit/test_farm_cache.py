"""Farms that were validated before: the same as ever, never out of date, believed only if ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings

import inventory
from inventory import kinds, loader, plain
from inventory.errors import InventoryError, NotFound
from inventory.loader import loads
from inventory.model import Farm
from inventory.validation import CORE_FILE, validated
from provision.farm_cache import known_farm
from tests.unit.test_inventory_properties import farms

ROOT = Path(__file__).resolve().parents[2]
TEXT = "farm: kata\ntemplates: {t: {build: debian-12}}\nvms:\n  prod: {memory: 512M}\n"


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The farm files that were validated."""
    seen: list[Path] = []

    def counted(data: bytes, path: Path) -> Farm:
        seen.append(path)
        return loads(data, path)

    monkeypatch.setattr(loader, "loads", counted)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "farm.yaml"
    path.write_text(TEXT)
    return path


def entries(cache: Path) -> list[Path]:
    return list((cache / f"farms-{os.geteuid()}").iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "inventory").glob("*.yaml")), ids=lambda p: p.name)
def test_every_farm_comes_back_equal(path: Path) -> None:
    farm = loader.load(path)
    again = plain.loads(plain.dumps(farm))
    assert again == farm
    assert repr(again) == repr(farm)  # to the types of what is in it


def test_what_equals_the_default_comes_back_as_it_was() -> None:
    text = TEXT + "ssh: {ready_timeout: 5m}\nnetwork: {lease_time: 12h}\n"
    farm = loads(text.encode(), Path("f.yaml"))
    assert repr(plain.loads(plain.dumps(farm))) == repr(farm)


@settings(max_examples=60, deadline=None)
@given(farms())
def test_any_farm_comes_back_equal(content: dict[str, object]) -> None:
    farm = validated(content)
    assert repr(plain.loads(plain.dumps(farm))) == repr(farm)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"7", b'{"!":"Vm"}', b'{"!":"Nothing"}', b'{"!":"Path"}',
             b'{"!":"Farm","farm":"x","vms":{},"more":1}', b'{"!":"re"}', b'{"!":"Model"}', b"\xff"],
)  # fmt: skip
def test_what_is_no_farm_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        plain.loads(text)


def test_an_unchanged_file_is_validated_once(
    tmp_path: Path, file: Path, validations: list[Path]
) -> None:
    first, second = known_farm(file, tmp_path / "c"), known_farm(file, tmp_path / "c")
    assert first == second
    assert first.path == second.path == file
    assert validations == [file]
    assert [(path.stat().st_mode & 0o777) for path in entries(tmp_path / "c")] == [0o600]
    assert entries(tmp_path / "c")[0].parent.stat().st_mode & 0o777 == 0o700


def test_the_same_text_elsewhere_is_the_farm_of_that_file(tmp_path: Path, file: Path) -> None:
    known_farm(file, tmp_path / "c")
    other = tmp_path / "other.yaml"
    other.write_text(TEXT)
    assert known_farm(other, tmp_path / "c").path == other


def test_a_changed_file_is_another_farm_though_size_and_times_are_the_same(
    tmp_path: Path, file: Path
) -> None:
    assert known_farm(file, tmp_path / "c").vms["prod"].memory == 512 * 2**20
    times = file.stat()
    file.write_text(TEXT.replace("512M", "256M"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_farm(file, tmp_path / "c").vms["prod"].memory == 256 * 2**20
    file.write_text(TEXT.replace("512M", "much"))
    with pytest.raises(InventoryError, match="much"):
        known_farm(file, tmp_path / "c")
    file.unlink()
    with pytest.raises(NotFound):
        known_farm(file, tmp_path / "c")


def test_other_code_validates_anew(
    tmp_path: Path, file: Path, validations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known_farm(file, tmp_path / "c")
    copied = tmp_path / "inventory"
    shutil.copytree(*inventory.__path__, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(inventory, "__path__", [str(copied)])
    known_farm(file, tmp_path / "c")
    assert len(validations) == 1  # it is the same code
    with (copied / "checks.py").open("a") as source:
        source.write("# another check\n")
    known_farm(file, tmp_path / "c")
    assert len(validations) == 2
    with (copied / CORE_FILE.name).open("a") as source:
        source.write("\n")
    known_farm(file, tmp_path / "c")
    assert len(validations) == 3


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    """A digit of the memory: a farm still, but not the one."""
    path.write_bytes(path.read_bytes().replace(b"536870912", b"536870913"))


def _open_to_all(path: Path) -> None:
    path.chmod(0o606)


def _open_directory(path: Path) -> None:
    path.parent.chmod(0o770)


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


def _link_directory(path: Path) -> None:
    path.parent.rename(path.parent.parent / "moved")
    path.parent.symlink_to(path.parent.parent / "moved")


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _give_away(path: Path) -> None:
    os.chown(path, 65534, -1)


def _give_directory_away(path: Path) -> None:
    os.chown(path.parent, 65534, -1)


HARM = [_shorten, _empty, _flip, _open_to_all, _open_directory, _link, _link_directory,
        _replace_by_directory]  # fmt: skip
HARM += [_give_away, _give_directory_away] if os.geteuid() == 0 else []


@pytest.mark.parametrize("harm", HARM)
def test_what_is_damaged_or_anothers_is_not_believed(
    tmp_path: Path, file: Path, validations: list[Path], harm: Callable[[Path], None]
) -> None:
    farm = known_farm(file, tmp_path / "c")
    [entry] = entries(tmp_path / "c")
    harm(entry)
    assert known_farm(file, tmp_path / "c") == farm
    assert len(validations) == 2


@pytest.mark.parametrize("harm", [_shorten, _empty, _flip, _open_to_all, _link])
def test_what_is_damaged_is_made_anew(
    tmp_path: Path, file: Path, validations: list[Path], harm: Callable[[Path], None]
) -> None:
    known_farm(file, tmp_path / "c")
    harm(entries(tmp_path / "c")[0])
    known_farm(file, tmp_path / "c")
    known_farm(file, tmp_path / "c")
    assert len(validations) == 2


def test_without_a_cache_it_works_as_well(tmp_path: Path, file: Path) -> None:
    (tmp_path / "c").write_text("a file where the directory should be")
    assert known_farm(file, tmp_path / "c").farm == "kata"
    assert known_farm(file, Path("/proc/nowhere")).farm == "kata"


def test_those_used_last_are_kept(tmp_path: Path, file: Path, validations: list[Path]) -> None:
    known_farm(file, tmp_path / "c")
    [entry] = entries(tmp_path / "c")
    os.utime(entry, (0, 0))
    for n in range(1, 600):
        (entry.parent / f"old{n}").touch()
        os.utime(entry.parent / f"old{n}", (n, n))
    known_farm(file, tmp_path / "c")
    other = tmp_path / "other.yaml"
    other.write_text(TEXT.replace("512M", "1G"))
    known_farm(other, tmp_path / "c")
    names = {path.name for path in entries(tmp_path / "c")}
    assert len(names) == 500
    assert {"old599", "old102", entry.name} <= names
    assert "old101" not in names
    known_farm(file, tmp_path / "c")
    assert validations == [file, other]


def test_other_code_of_a_kind_of_section_validates_anew(
    tmp_path: Path, file: Path, validations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sections of drivers stand with the drivers."""
    here = [room for room in kinds.rooms() if room.name == "libvirt"]
    assert here
    copied = tmp_path / "libvirt"
    shutil.copytree(here[0], copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kinds, "rooms", lambda: [copied])
    known_farm(file, tmp_path / "c")
    known_farm(file, tmp_path / "c")
    assert len(validations) == 1
    with (copied / "host.py").open("a") as source:
        source.write("# another check\n")
    known_farm(file, tmp_path / "c")
    assert len(validations) == 2
