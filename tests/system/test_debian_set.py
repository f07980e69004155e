"""Source packages of Debian 12 that need one another, from its archive, and the rpm set of
examples/packages/, each built in its order on two real VMs; some of it built again, to the same bytes.

Three quarters of an hour where the guests are emulated, so ./invoke test leaves it out:
./invoke test --only tests/system/test_debian_set.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
from debian_sources import fetch_sources
from package_machines import BuilderFarm, became, builder_farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]

DEBS: Mapping[str, Collection[str]] = {
    "libmd": (),
    "libbsd": ("libmd",),
    "rdate": ("libbsd",),
    "libclass-method-modifiers-perl": (),
    "librole-tiny-perl": ("libclass-method-modifiers-perl",),
    "librole-eventemitter-perl": ("librole-tiny-perl",),
    "libsub-exporter-perl": (),
    "libsub-exporter-progressive-perl": ("libsub-exporter-perl",),
    "libdevel-globaldestruction-perl": ("libsub-exporter-progressive-perl",),
    "libtest-exception-perl": (),
    "libversion-next-perl": ("libsub-exporter-perl", "libtest-exception-perl"),
    "libtry-tiny-perl": (),
    "libtest-fatal-perl": ("libtry-tiny-perl",),
    "libtest-deep-perl": (),
}
"""Each with those of the set that it needs to be built."""
RPMS: Mapping[str, Collection[str]] = {
    "libtally": (),
    "farm-notes": (),
    "tally": ("libtally", "farm-notes"),
    "tally-book": ("tally",),
}
_FARM = """\
farm: set
templates:
  base:
    build: debian-12
    packages:
      - build-essential
      - fakeroot
      - debhelper
      - dnf
      # what the set needs of the archive's others
      - libcapture-tiny-perl
      - libdata-optlist-perl
      - libsub-name-perl
      - libsub-uplevel-perl
      - libtest-needs-perl
vms:
  builder1: {memory: 1G, idle_memory: 512M}
repositories:
  made: {format: FORMAT}
build:
  cloned: {count: 2, like: builder1}
  repository: made
"""


def build_all(farm: BuilderFarm, needs: Mapping[str, Collection[str]]) -> None:
    """All are built, each after what it needs, and with just that; then nothing is to be done."""
    farm.json("clone-farm")
    run = farm.json("build")
    assert became(run) == {"passed": set(needs)}
    assert run["generation"]
    records = {name: farm.record(name, 1) for name in needs}
    for name, earlier in needs.items():
        ours = {one["sha256"] for one in records[name]["inputs"]["installed"]}
        for other in earlier:
            assert records[other]["ended"] <= records[name]["started"], (other, name)
            made = {file["sha256"] for file in records[other]["outputs"]}
            assert made & ours, f"{name} was not built with the {other} of this run"
    assert {record["builder"]["vm"] for record in records.values()} == {"builder1", "builder2"}
    before = farm.builds()
    farm.json("build")
    assert farm.builds() == before == dict.fromkeys(needs, 1)


def test_fourteen_debian_packages_in_their_order() -> None:
    with builder_farm("set") as farm:
        sources = fetch_sources(DEBS, farm.directory / "debian")
        lines = [f"  {name}: {{dsc: {path}}}\n" for name, path in sources.items()]
        farm.file.write_text(f"{_FARM.replace('FORMAT', 'deb')}packages:\n{''.join(lines)}")
        build_all(farm, DEBS)
        for name, path in sources.items():
            version = farm.record(name, 1)["inputs"]["version"]
            upstream = version.rpartition(":")[2]  # an epoch is in no file's name
            assert path.name == f"{name}_{upstream}.dsc"
        for name in ("rdate", "libtest-fatal-perl"):
            farm.json("rebuild", "--verify", "--build", f"{name}/1")


def test_the_rpm_packages_of_the_examples() -> None:
    with builder_farm("set") as farm:
        farm.file.write_text(_FARM.replace("FORMAT", "rpm") + "  example: rpm\n")
        build_all(farm, RPMS)
        for name in ("tally", "tally-book"):
            farm.json("rebuild", "--verify", "--build", f"{name}/1")
