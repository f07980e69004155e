"""Hostile input of every kind that is read: there is an answer or one error of ours, soon, and nothing
of it gets out of its place in what is made of it.

A few hundred inputs; FARMHAND_FUZZ=N tries N of each kind. The summary at the end says how many there
were of each, how many were taken, and what the slowest took. (tests/services/test_hostile.py, by the
same variable, has farms read back by the daemons' own parsers.)"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import cli.composition  # noqa: F401 - what there is
from builds.record import BuildRecord, FileRecord, StepRecord, VmRecord, all_records, find_record, now
from cli import views
from host.paths import FarmPaths
from host.run import Runner
from hypervisors.api import Owner
from hypervisors.disks.contents import contents
from hypervisors.disks.images import image_info, unpacked
from hypervisors.disks.qcow2.format import measure
from hypervisors.disks.qcow2.store import Mark, read_mark, read_template
from inventory.errors import FarmhandError, InventoryError
from inventory.loader import loads
from provision.allocate import Allocation
from provision.lockfile import LockFile
from provision.network.importing import network_import
from provision.network.render import render
from tests.identities import identity
from tests.services.yard import Yard

MANY = int(os.environ.get("FARMHAND_FUZZ", "0"))
LIMIT = 5  # seconds of our own work; a busy machine's don't count
MIB = 2**20


def tries(few: int) -> settings:
    return settings(
        max_examples=MANY or few, deadline=None, derandomize=not MANY, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip


@dataclass
class Count:
    tried: int = 0
    taken: int = 0
    slowest: float = 0.0


@dataclass
class Counts:
    of: dict[str, Count] = field(default_factory=dict)

    @contextmanager
    def trying(self, kind: str) -> Iterator[Count]:
        """One input. TimeoutError after LIMIT; whatever else isn't ours, too, fails the test."""
        count = self.of.setdefault(kind, Count())
        count.tried += 1
        before = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
        began = time.process_time()
        try:
            yield count
        except FarmhandError as error:
            for line in (
                (error.message or " ").splitlines()
                if isinstance(error, InventoryError)
                else [error.message]
            ):
                assert line.isprintable(), f"{line!r}"
        else:
            count.taken += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            count.slowest = max(count.slowest, time.process_time() - began)


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"it takes more than {LIMIT} s")


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[Counts]:
    found = Counts()
    yield found
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        for kind, c in found.of.items():
            line = f"{kind}: {c.tried} tried, {c.taken} taken, the slowest {c.slowest:.2f} s"
            plugins.getplugin("terminalreporter").write_line(
                f"\n{line}" if kind == next(iter(found.of)) else line
            )


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fhz", dir="/dev/shm") as name:
        yield Path(name)


# ---- What is made of good input


@st.composite
def mutated(draw: st.DrawFn, originals: tuple[bytes, ...]) -> bytes:
    """One of these, changed in a few places, cut off, or with a part of another."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["put", "insert", "number", "cut", "join", "twice"])):
            case "put":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(st.one_of(st.binary(max_size=8), PIECES))
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                value = draw(st.sampled_from([0, 1, 2 ** (size * 8) - 1, 2 ** (size * 8 - 1)]))
                data[at : at + size] = value.to_bytes(size)
            case "cut":
                del data[at : at + draw(st.integers(1, 4096))]
            case "join":
                data[at:] = draw(st.sampled_from(originals))[at:]
            case "twice":
                data[at:at] = data[at : at + draw(st.integers(1, 512))]
    return bytes(data)


EVIL = "EVIL"
PIECES = st.sampled_from(
    [
        b"\n", b"\r\n", b"\0", b"\x1b[31m", b'"', b"'", b"\\", b"{", b"}", b"[" * 2000, b"{" * 2000,
        b'"a": ', b"null", b"9" * 5000, b"1e999", b"NaN", b"-1", b"../../x", b"\xff\xfe",
        b'"\\ud800"', b";", b"$INCLUDE /etc/passwd\n",
        b"\\" * 3000, b'\\"' * 3000, b"$GENERATE 1-9999999999 a$ A 10.0.0.1\n",
        b"$ORIGIN .\n", b"()" * 1000, f'"\n{EVIL}: x\n"'.encode(), f"]\n{EVIL}: x\n".encode(),
        "\u2028\u202e\U0001f600".encode(),
    ]
)  # fmt: skip
anything = st.recursive(
    st.none(),
    lambda of: st.lists(of, max_size=2) | st.dictionaries(st.text(max_size=2), of, max_size=2),
    max_leaves=6,
)
wrong = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), anything,
    st.sampled_from([10**30, -1, 2**63, 1e308, "", [], {}]),
    st.sampled_from([f"a\n{EVIL}: x", "../../etc/passwd", "\ud800", "\x1b[2J", "x" * 70000]),
)  # fmt: skip


@st.composite
def mistyped(draw: st.DrawFn, original: dict[str, Any]) -> bytes:
    """The JSON object with something else in some places."""
    document = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and draw(st.booleans()):
                node = node[key]
                continue
            node[key] = draw(wrong)
            break
    return json.dumps(document).encode()


def hostile_json(original: dict[str, Any]) -> st.SearchStrategy[bytes]:
    text = json.dumps(original, indent=1).encode()
    return st.one_of(mistyped(original), mutated((text,)))


# ---- Farm files


FARM = (Path(__file__).parents[2] / "inventory" / "gallifrey.yaml").read_bytes()
nasty = st.sampled_from(
    ["", '"', "'", ";", "}", "{", "\\", "$HOME", "`id`", "-->", "#", "{{ 1 }}", "*/",
     "\n", "\r", "\0", "\x85", "\u2028", "../..", "é", EVIL, f"; {EVIL} {{", "END farmhand try-it", "\t"]
)  # fmt: skip
text = st.lists(st.one_of(nasty, st.text(max_size=6)), max_size=5).map("".join)
label = st.from_regex(r"[a-z](?:[a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
vms = st.dictionaries(
    st.one_of(label, label, label, text),
    st.fixed_dictionaries(
        {},
        optional={
            "description": text, "hostname": st.one_of(label, text),
            "aliases": st.lists(label, max_size=2),
            "mac": st.one_of(text, st.just("52:54:00:00:00:07")), "address": st.just("10.77.0.9"),
            "nat_port": st.one_of(text, st.integers(1, 65535).map(str)),
            "proxy": st.lists(st.fixed_dictionaries({"name": st.one_of(text, label)}), max_size=2),
        },
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@tries(150)
@given(data=mutated((FARM,)))
def test_farm_files(counts: Counts, data: bytes) -> None:
    with counts.trying("farm files, damaged"):
        loads(data, Path("f.yaml"))


@tries(60)
@given(declared=vms)
def test_farms(counts: Counts, declared: dict[str, Any]) -> None:
    """What is taken is rendered in as many lines as with harmless words in the same places."""
    with tempfile.TemporaryDirectory(prefix="fhz", dir="/dev/shm") as name:
        yard = Yard(Path(name))
        yard.vms = declared
        with counts.trying("farm files, hostile values"):
            lines = _lines(yard)
            for vm in yard.vms.values():
                if "description" in vm:
                    vm["description"] = "harmless" if vm["description"].strip() else vm["description"]
            assert lines == _lines(yard)


def _lines(yard: Yard) -> dict[str, int]:
    farm = yard.farm()
    documents = render(farm, yard.allocations())
    return {d.path: len(d.text.splitlines()) for d in documents}


# ---- Images


@pytest.fixture(scope="module")
def images(place: Path) -> tuple[bytes, ...]:
    """Of each format, small, as qemu-img makes them."""
    made = []
    raw = place / "disk.raw"
    raw.write_bytes(bytes(510) + b"\x55\xaa" + bytes(65536 - 512))
    for kind, options in (
        ("raw", ""), ("qcow2", "compat=1.1"), ("qcow2", "compat=0.10"), ("vmdk", ""), ("vpc", ""),
        ("vpc", "subformat=fixed"), ("vhdx", ""), ("vdi", ""), ("qed", ""),
    ):  # fmt: skip
        out = place / "made.img"
        words = ["-o", options] if options else []
        subprocess.run(["qemu-img", "convert", "-O", kind, *words, raw, out], check=True)
        made.append(out.read_bytes()[: 2**19])
    return tuple(made)


@tries(40)
@given(data=st.data())
def test_image_headers(
    counts: Counts, images: tuple[bytes, ...], place: Path, data: st.DataObject
) -> None:
    image = place / "image.img"
    image.write_bytes(data.draw(mutated(images)))
    with counts.trying("image headers, template-import"):
        info = image_info(Runner(), image)
        assert info.size >= 0
        contents(Runner(), image, info)
        assert unpacked(Runner(), image, info) >= 0
    with counts.trying("image headers, stores"):
        measure(image)


# ---- Zones and dhcpd.conf


ZONE = b"""\
$TTL 600
@ IN SOA ns root ( 2011072501 ; serial
  3600 600 604800 300 )
  IN NS ns
ns IN A 10.10.60.1
web IN A 10.10.60.5
web2 IN A 10.10.60.6
www IN CNAME web
$GENERATE 10-20 h$ A 10.10.60.$
"""
DHCPD = b"""\
# the farm's
option domain-name-servers 10.10.60.1, ns.example.org;
subnet 10.10.60.0 netmask 255.255.255.0 {
  option routers 10.10.60.1;
  range 10.10.60.200 10.10.60.220;
  group { host web { hardware ethernet 52:54:0:1:2:3; fixed-address 10.10.60.5; } }
}
host web2 { hardware ethernet 52:54:86:B3:3F:10; fixed-address web2.farm; option host-name "a; } b"; }
"""
KNOWN = {"farm", "hosts", "network", "services", "templates", "vms"}


@tries(150)
@given(zone=mutated((ZONE,)), dhcpd=st.one_of(st.just(DHCPD), mutated((DHCPD,))))
def test_zones_and_dhcpd_files(counts: Counts, place: Path, zone: bytes, dhcpd: bytes) -> None:
    first, second = place / "db.farm", place / "dhcpd.conf"
    first.write_bytes(zone)
    second.write_bytes(dhcpd)
    with counts.trying("zones and dhcpd.conf"):
        found = network_import(first, second)
        made = yaml.load(found.text, yaml.CSafeLoader)
        assert set(made) == KNOWN
        assert set(made["vms"]) == set(found.vms)
        for vm in made["vms"].values():
            assert set(vm) <= {"mac", "address", "hostname", "aliases"}


# ---- What is ours


LOCK = {
    "about": "x", "format": 1, "farm": "try",
    "vms": {
        "dev2": {"mac": "52:54:00:00:00:01", "address": "10.9.9.2", "ssh_port": 22},
        "prod": {"mac": "52:54:00:00:00:02", "address": None, "ssh_port": 22},
    },
    "resting": {"10.9.9.9": {"vm": "old", "until": "2999-01-01T00:00:00+00:00"}},
}  # fmt: skip


@tries(150)
@given(data=hostile_json(LOCK))
def test_lock_files(counts: Counts, place: Path, data: bytes) -> None:
    """What is taken can be written, and read again as the same."""
    path = place / "try.yaml.lock"
    path.write_bytes(data)
    with counts.trying("lock files"):
        content = LockFile("try", path).read()
        file = LockFile("try", path)
        file.write(content.copy(), content.vms)
        again = LockFile("try", path).read()
        assert again.vms == content.vms
        for entry in again.vms.values():
            Allocation("a", entry["mac"], IPv4Address(entry["address"] or "10.0.0.1"), entry["ssh_port"])


def _record(place: Path) -> dict[str, Any]:
    files = (FileRecord(name="a.deb", size=1, sha256="0" * 64),)
    step = StepRecord(
        name="make", kind="run", vm="dev2", status="failed", log="01-make.log", files=files, exit=1,
        details={"a": "b"}, tail="x", remedy="look",
    )  # fmt: skip
    record = BuildRecord(
        id="build", farm="try", result="failed", started=now(), ended=now(), directory=place,
        outputs=files,
        vms=(VmRecord(vm="dev2", pristine=True, clock_skew=0.1),), steps=(step,), notes=("a note",),
    )  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    record.save()
    found: dict[str, Any] = json.loads(record.path.read_text())
    return found


@pytest.fixture
def paths(place: Path, monkeypatch: pytest.MonkeyPatch) -> FarmPaths:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(place / "state"))
    return FarmPaths("try")


@tries(150)
@given(data=st.data())
def test_records(counts: Counts, paths: FarmPaths, data: st.DataObject) -> None:
    """What is taken can be shown."""
    directory = paths.builds / "build"
    original = _record(directory)
    (directory / "record.json").write_bytes(data.draw(hostile_json(original)))
    with counts.trying("build records"):
        builds, unreadable = all_records(paths)
        assert len(builds) + len(unreadable) == 1
        shown = views.history((), builds, 20, unreadable)
        json.dumps(shown.data, default=str)
        record = find_record(paths, "build")
        assert json.dumps(views.build_record(record).data, default=str)
        assert (directory / record.steps[0].log).parent == directory if record.steps else True


@tries(150)
@given(data=st.data())
def test_marks_and_descriptions(counts: Counts, place: Path, data: st.DataObject) -> None:
    home = place / "try-prod"
    home.mkdir(exist_ok=True)
    mark = Mark("try-prod", Owner(identity("try"), "prod"), "base@1", MIB, _when())
    (home / "owner.json").write_bytes(data.draw(hostile_json(json.loads(mark.document()))))
    with counts.trying("marks of qcow2 disks"):
        found = read_mark(home)
        assert found is None or found.machine == "try-prod"
    image = place / "base@1.qcow2"
    image.touch()
    described = {
        "farmhand": 1, "name": "base", "generation": 1, "size": MIB, "sha256": "0" * 64, "origin": "x",
        "created": _when().isoformat(), "firstboot": "farmhand",
    }  # fmt: skip
    (place / "base@1.json").write_bytes(data.draw(hostile_json(described)))
    with counts.trying("descriptions of templates"):
        read_template(image)


def _when() -> Any:
    from datetime import UTC, datetime

    return datetime(2026, 1, 1, tzinfo=UTC)
