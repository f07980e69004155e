"""Golden disks on a real qcow2 store."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hypervisors.api import Owner
from hypervisors.disks import images
from inventory.errors import NotFound, UsageError, WrongState, spelled
from provision import farm
from provision.engine.report import QuietReporter
from provision.guest.debian import load_recipe
from provision.operations import templates as golden
from provision.site import Site, open_site

FARM = """
farm: t
templates:
  base: {build: debian-12, size: 1G}
  cloud: {import: cloud.raw, size: 2M}
vms:
  one: {template: cloud}
  two: {template: base}
"""
MIB = 2**20


@pytest.fixture
def farm_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for place in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        place.chmod(0o711)  # QEMU, under another user, must be able to pass
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    (tmp_path / "cloud.raw").write_bytes(bytes(510) + b"\x55\xaa" + b"x" * (MIB - 512))
    path = tmp_path / "farm.yaml"
    path.write_text(FARM)
    return path


@pytest.fixture
def site(farm_file: Path) -> Iterator[Site]:
    with open_site(farm_file, reporter=QuietReporter()) as opened:
        yield opened


def put_in_cache(site: Site, created: datetime) -> Path:
    """A disk as if it had been built."""
    key = load_recipe("debian-12").digest(site.farm.templates["base"].size)
    image = golden._image_file(key)
    image.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    note = {"bytes": image.stat().st_size, "sha256": "0" * 64, "created": created.isoformat()}
    image.with_suffix(".json").write_text(json.dumps(note))
    return image


def test_an_import_is_sealed_grown_and_recorded(site: Site, farm_file: Path) -> None:
    outcome = farm.template_import(site, "cloud")
    assert outcome.changed
    (template,) = golden.template_list(site)
    assert template.label == "cloud@1" == outcome.result.template
    assert template.size == 2 * MIB
    assert template.firstboot == "cloud-init"
    assert len(template.sha256) == 64
    assert template.origin.startswith("cloud.raw sha256:")
    assert (farm_file.parent / "cloud.raw").exists()
    assert not [p for p in golden._images().iterdir() if p.name not in (".lock", ".running")]
    assert golden.ensure_template(site, "cloud") == template


SECRET = b"only root may read this" * 100


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A qcow2 image that shows another file as its own content."""
    secret, path = tmp_path / "secret", tmp_path / "overlay"
    secret.write_bytes(SECRET.ljust(MIB, b"."))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, path, "1M"], check=True
    )
    return path


@pytest.fixture
def shared(farm_file: Path) -> Path:
    """An image whose owner may change it at any time, in the form in which it can name other files."""
    path = farm_file.parent / "cloud.raw"
    raw = path.rename(path.with_name("raw"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path


def renamed(overlay: Path, image: Path) -> None:
    overlay.rename(image)


def rewritten(overlay: Path, image: Path) -> None:
    image.write_bytes(overlay.read_bytes())


def linked(overlay: Path, image: Path) -> None:
    image.unlink()
    image.symlink_to(overlay.parent / "secret")


SWAPS = pytest.mark.parametrize("swap", [renamed, rewritten, linked])


@SWAPS
def test_an_image_swapped_once_it_was_checked_changes_nothing(
    site: Site, shared: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    content = shared.with_name("raw").read_bytes()
    digest = hashlib.sha256(shared.read_bytes()).hexdigest()
    real = images.convert
    monkeypatch.setattr(
        images, "convert", lambda *args, **named: (swap(overlay, shared), real(*args, **named))
    )
    farm.template_import(site, "cloud")
    (template,) = golden.template_list(site)
    raw = shared.with_name("out")
    subprocess.run(["qemu-img", "convert", "-O", "raw", template.ref, raw], check=True)
    assert raw.read_bytes()[: len(content)] == content
    assert template.origin == f"cloud.raw sha256:{digest}"


@SWAPS
def test_an_image_swapped_after_the_plan_is_refused(
    site: Site, shared: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    real = golden._cache_lock
    monkeypatch.setattr(golden, "_cache_lock", lambda site: (swap(overlay, shared), real(site))[1])
    with pytest.raises((UsageError, WrongState), match=r"cloud\.raw") as refused:
        farm.template_import(site, "cloud")
    assert "stand alone" in refused.value.message or "replaced" in refused.value.message
    assert golden.template_list(site) == ()
    assert not list(golden._images().glob(".import-*"))


def test_a_vmdk_is_imported(site: Site, farm_file: Path) -> None:
    """Its own name is in it, and it is read under another one."""
    raw, image, out = (farm_file.parent / name for name in ("cloud.raw", "cloud.vmdk", "out"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, image], check=True)
    farm.template_import(site, "cloud", image)
    (template,) = golden.template_list(site)
    subprocess.run(["qemu-img", "convert", "-O", "raw", template.ref, out], check=True)
    assert out.read_bytes()[:MIB] == raw.read_bytes()


def test_a_sparse_image_stays_sparse_and_what_is_no_file_is_refused(
    site: Site, farm_file: Path, tmp_path: Path
) -> None:
    image, copy = tmp_path / "sparse", tmp_path / "copy"
    with image.open("wb") as file:
        file.seek(2**26)
        file.write(b"x")
        file.truncate(2**27 + 1)
    with images.open_image(image) as opened:
        digest = images.copy_image(opened, copy)
    assert digest == images.sha256_file(image) == images.sha256_file(copy)
    assert copy.stat().st_blocks * 512 <= 2 * MIB
    assert copy.stat().st_mode & 0o777 == 0o600
    pipe = farm_file.parent / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="neither a file nor"):
        farm.template_import(site, "cloud", pipe)


def test_a_generation_number_never_comes_again(site: Site) -> None:
    farm.template_import(site, "cloud")
    farm.template_import(site, "cloud")
    farm.template_remove(site, "cloud@2")
    farm.template_import(site, "cloud")
    assert [t.label for t in golden.template_list(site)] == ["cloud@1", "cloud@3"]
    newest = golden.newest_template(site, "cloud")
    assert newest is not None
    assert newest.generation == 3


def test_a_plan_says_what_the_run_does_and_does_nothing(
    site: Site, farm_file: Path, tmp_path: Path
) -> None:
    kept = sorted((tmp_path / "cache").rglob("*"))  # the farm file, validated
    farm_file.write_text(farm_file.read_text() + "# another one\n")
    with open_site(farm_file, reporter=QuietReporter(), plan=True) as planning:
        planned = farm.template_import(planning, "cloud")
        planned_build = farm.template_build(planning, "base")
    assert planned.planned
    assert "build a disk from debian-12" in planned_build.actions[0].text
    assert not (tmp_path / "state").exists()
    assert sorted((tmp_path / "cache").rglob("*")) == kept
    assert farm.template_import(site, "cloud").actions == planned.actions


def test_a_template_with_clones_stays(site: Site) -> None:
    farm.template_import(site, "cloud")
    (template,) = golden.template_list(site)
    store = site.disks("here")
    store.clone(template, "t-one", Owner(site.identity, "one"), template.size)
    with pytest.raises(WrongState, match="t-one"):
        farm.template_remove(site, "cloud@1")
    store.destroy("t-one")
    farm.template_remove(site, "cloud@1")
    assert golden.template_list(site) == ()


def test_a_cached_disk_is_used_again_and_stays(site: Site) -> None:
    image = put_in_cache(site, datetime.now(UTC))
    outcome = farm.template_build(site, "base")
    assert outcome.actions[0].verb == "reuse"
    farm.template_remove(site, "base@1")
    assert image.exists()
    assert farm.template_build(site, "base").result.template == "base@2"


def test_an_aged_or_cut_disk_is_not_used(site: Site, farm_file: Path) -> None:
    image = put_in_cache(site, datetime(2020, 1, 1, tzinfo=UTC))
    with open_site(farm_file, reporter=QuietReporter(), plan=True) as planning:
        assert farm.template_build(planning, "base").actions[0].verb == "build"
        put_in_cache(site, datetime.now(UTC))
        image.write_bytes(image.read_bytes()[:-1])
        assert farm.template_build(planning, "base").actions[0].verb == "build"


def test_what_a_killed_build_left_goes_with_the_next(site: Site) -> None:
    left = golden._images() / ".build-dead"
    left.mkdir(parents=True)
    (left / "root.tar").write_text("x")
    farm.template_import(site, "cloud")
    assert not left.exists()


def test_refusals_name_what_to_do(site: Site, farm_file: Path) -> None:
    with pytest.raises(NotFound) as caught:
        farm.template_build(site, "bse")
    assert "base" in spelled(caught.value.remedy)
    with pytest.raises(UsageError) as wrong:
        farm.template_build(site, "cloud")
    assert spelled(wrong.value.remedy) == "template-import --name cloud"
    with pytest.raises(UsageError):
        farm.template_import(site, "base")
    with pytest.raises(NotFound):
        farm.template_remove(site, "cloud@9")
    (farm_file.parent / "cloud.raw").unlink()
    with pytest.raises(NotFound, match=r"cloud\.raw"):
        farm.template_import(site, "cloud")
