"""Golden disks on a real qcow2 store."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import pytest

from hypervisors.api import Owner
from hypervisors.disks import images
from hypervisors.disks.contents import contents
from inventory.errors import Busy, NotFound, Unsupported, UsageError, WrongState, spelled
from provision.engine.report import QuietReporter
from provision.guest.debian import load_recipe
from provision.operations import templates as golden
from provision.site import Site, open_site
from provision.template_recipe import is_outdated, origin
from tests import farm

FARM = """
farm: t
templates:
  base: {build: debian-12, size: 1G}
  cloud: {import: cloud.raw, size: 2M}
  efi: {import: cloud.raw, firmware: efi}
  kernel: {import: cloud.raw, boot: {kernel: /boot/vmlinuz, cmdline: root=/dev/vda ro}}
vms:
  one: {template: cloud}
  two: {template: base}
  three: {template: kernel}
  four: {template: efi}
"""
MIB = 2**20
ROOT = Path(__file__).parents[2]


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


def put_in_cache(site: Site, created: datetime, packages: bytes = b"apt 2.6.1 amd64\n") -> Path:
    """A disk as if it had been built of these packages."""
    key = load_recipe("debian-12").digest(site.farm.templates["base"].size)
    image = golden._image_file(key)
    image.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"], check=True)
    note = {
        "bytes": image.stat().st_size, "sha256": "0" * 64, "created": created.isoformat(),
        "origin": origin("debian-12", key, packages),
    }  # fmt: skip
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


def test_an_image_imported_for_a_template_that_is_built_is_nobody_of_ours(site: Site) -> None:
    """It has the first boot of an imported one; what is built from the recipe, farmhand's own."""
    farm.template_import(site, "base", site.farm.path.parent / "cloud.raw")
    put_in_cache(site, datetime.now(UTC))
    farm.template_build(site, "base")
    found = [(t.label, t.firstboot) for t in golden.template_list(site)]
    assert found == [("base@1", "cloud-init"), ("base@2", "farmhand")]


def efi_disk(image: Path) -> None:
    table = "label: gpt\nsize=1M, type=U\ntype=L\n"
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)


def bare_file_system(image: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", image], check=True)


NO_START = pytest.mark.parametrize(
    ("make", "message"),
    [(efi_disk, "starts by EFI only"), (bare_file_system, "holds ext4 without partitions")],
)


@NO_START
def test_what_no_bios_starts_is_refused_unless_a_kernel_of_the_host_does(
    site: Site, farm_file: Path, make: Callable[[Path], None], message: str
) -> None:
    image = farm_file.parent / "cloud.raw"
    image.write_bytes(bytes(8 * MIB))
    make(image)
    with open_site(farm_file, reporter=QuietReporter(), plan=True) as planning, pytest.raises(
        Unsupported, match=f"{image} {message}.* host here"
    ) as refused:  # fmt: skip
        farm.template_import(planning, "cloud")
    assert "give template cloud a 'boot'" in spelled(refused.value.remedy)
    farm.template_import(site, "kernel")
    assert [t.label for t in golden.template_list(site)] == ["kernel@1"]


def test_what_is_to_start_by_efi_must(site: Site, farm_file: Path) -> None:
    image = farm_file.parent / "cloud.raw"
    with pytest.raises(Unsupported, match=f"{image} has no EFI system partition, and template efi"):
        farm.template_import(site, "efi")
    image.write_bytes(bytes(8 * MIB))
    efi_disk(image)
    farm.template_import(site, "efi")
    assert [t.label for t in golden.template_list(site)] == ["efi@1"]


@NO_START
def test_xens_own_boot_loader_needs_no_bios(
    site: Site, farm_file: Path, make: Callable[[Path], None], message: str
) -> None:
    image = farm_file.parent / "cloud.raw"
    image.write_bytes(bytes(8 * MIB))
    make(image)
    found = contents(site.runner, image, images.image_info(site.runner, image))
    network = "network: {mode: bridge, bridge: b0, addressing: dhcp}"
    without = FARM.replace(", firmware: efi", "")
    farm_file.write_text(f"{without}hosts: {{here: {{driver: xen, uri: 'xen:///system'}}}}\n{network}\n")
    with open_site(farm_file, reporter=QuietReporter(), plan=True) as xen:
        assert golden._check_starts(xen, "cloud", ["here"], image, found) is None
    with pytest.raises(Unsupported, match=message):
        golden._check_starts(site, "cloud", ["here"], image, found)


def test_an_image_in_use_is_not_imported(site: Site, farm_file: Path) -> None:
    image = farm_file.parent / "cloud.raw"
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin
        assert writer.stdout
        assert writer.stdout.read(8) == b"qemu-io>"
        with pytest.raises(Busy, match=r"cloud\.raw is in use"):
            farm.template_import(site, "cloud")
        writer.stdin.close()
    farm.template_import(site, "cloud")


def test_an_image_that_is_still_written_to_is_not_imported(
    site: Site, farm_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a download under way."""
    image, real = farm_file.parent / "cloud.raw", images.copy_image

    def arriving(file: BinaryIO, out: Path) -> str:
        with image.open("ab") as more:
            more.write(bytes(512))
        return real(file, out)

    monkeypatch.setattr(images, "copy_image", arriving)
    with pytest.raises(WrongState, match=r"cloud\.raw was written to while"):
        farm.template_import(site, "cloud")
    assert golden.template_list(site) == ()
    assert not list(golden._images().glob(".import-*"))


SMALL = """
import sys
from pathlib import Path
import cli.composition
from inventory.errors import NoSpace
from tests import farm
from provision.engine.report import QuietReporter
from provision.site import open_site
with open_site(Path(sys.argv[1]), reporter=QuietReporter(), plan=sys.argv[2] == "plan") as site:
    try:
        farm.template_import(site, "cloud")
    except NoSpace as error:
        print(error.message)
"""


@pytest.mark.parametrize(("where", "how"), [("cache", "run"), ("state", "plan")])
def test_what_unpacks_to_more_than_there_is_room_is_refused_before(
    farm_file: Path, where: str, how: str
) -> None:
    """On a real small file system; packed, it would fit many times."""
    raw, image, small = (farm_file.parent / name for name in ("raw", "cloud.raw", where))
    raw.write_bytes((bytes(510) + b"\x55\xaa").ljust(96 * MIB, b"x"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image], check=True)
    assert image.stat().st_size < 2 * MIB
    raw.unlink()
    small.mkdir(exist_ok=True)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-eu", "-c",
         'mount -t tmpfs -o size=80m,mode=711 none "$1"; "$2" -c "$3" "$4" "$5"; '
         'find "$1" -name "*.qcow2"', "sh", small, sys.executable, SMALL, farm_file, how],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, *left = done.stdout.splitlines()
    assert ("copied and unpacked, takes" if where == "cache" else "unpacks to 96M") in told
    assert left == []


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


def change_image(site: Site) -> None:
    with (site.farm.path.parent / "cloud.raw").open("ab") as file:
        file.write(b"y" * 512)


def test_a_generation_number_never_comes_again(site: Site) -> None:
    farm.template_import(site, "cloud")
    change_image(site)
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


def test_no_generation_is_the_same_as_the_last(site: Site, farm_file: Path) -> None:
    put_in_cache(site, datetime.now(UTC))
    farm.template_build(site, "base")
    with open_site(farm_file, reporter=QuietReporter(), plan=True) as planning:
        planned = farm.template_build(planning, "base")
    again = farm.template_build(site, "base")
    assert [action.verb for action in again.actions] == ["keep"]
    assert again.actions == planned.actions
    assert "base@1 is of the same recipe" in str(again.actions[0])
    assert spelled(again.actions[0].text).endswith("template-build --name base --fresh")
    assert (again.result.template, again.result.same) == ("base@1", True)
    farm.template_import(site, "cloud")
    same = farm.template_import(site, "cloud")
    assert "nothing is sealed: cloud@1 is of the same image" in str(same.actions[-1])
    assert [t.label for t in golden.template_list(site)] == ["base@1", "cloud@1"]
    put_in_cache(site, datetime.now(UTC), b"apt 2.6.1+deb12u1 amd64\n")  # another farm's, built fresh
    assert farm.template_build(site, "base").result.template == "base@2"


def test_fresh_takes_no_disk_from_the_cache(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdebstrap's place is taken: what it makes is the cached disk, with the packages said here."""
    cached = put_in_cache(site, datetime.now(UTC))
    farm.template_build(site, "base")
    sealed = golden.template_list(site)[0]
    before = Path(sealed.ref).read_bytes()
    now = b"apt 2.6.1 amd64\n"

    def build(_runner: object, _recipe: object, *, out: Path, packages: Path, **_more: object) -> None:
        out.write_bytes(cached.read_bytes() + b"another disk")
        packages.write_bytes(now)

    monkeypatch.setattr("provision.guest.debian.build_image", build)
    same = farm.template_build(site, "base", fresh=True)
    assert [action.verb for action in same.actions] == ["build", "keep"]
    assert same.result.same
    now = b"apt 2.6.1+deb12u1 amd64\n"
    newer = farm.template_build(site, "base", fresh=True)
    assert newer.result.template == "base@2"
    assert Path(sealed.ref).read_bytes() == before, "sealed disks share the cache's files"
    monkeypatch.setattr("provision.guest.debian.build_image", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        farm.template_build(site, "base", fresh=True)
    assert farm.template_build(site, "base").result.same, "a build that failed leaves the cache"


def test_a_generation_older_than_the_recipe(site: Site, farm_file: Path) -> None:
    put_in_cache(site, datetime.now(UTC))
    farm.template_build(site, "base")
    (template,) = golden.template_list(site)
    assert not is_outdated(site, template)
    farm_file.write_text(FARM.replace("size: 1G}", "size: 1G, packages: [curl, jq]}"))
    with open_site(farm_file, reporter=QuietReporter()) as changed:
        assert is_outdated(changed, template)
        assert any("base@1 is older than the file's recipe" in spelled(note) for note in
                   farm.status(changed).warnings)  # fmt: skip


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
