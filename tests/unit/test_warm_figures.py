"""What the figures of warm resets are made with. The figures themselves: ``./invoke bench --warm``."""

from __future__ import annotations

import inspect
import socket
import threading
import time
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

from hypervisors.api import Forward, MachineSpec, Nic, Owner
from hypervisors.libvirt.domain_xml import domain_xml
from hypervisors.libvirt.warm import machines
from hypervisors.libvirt.warm.machines import WarmDomains
from provision.engine.journal import Journal
from tests import bench_warm
from tests.figures import Figure, Figures
from tests.identities import KATA

SVG = "{http://www.w3.org/2000/svg}"


def of(tools: dict[str, tuple[float, float, float]]) -> Figures:
    found = []
    for tool, values in tools.items():
        for size, value in zip(bench_warm.SIZES, values, strict=True):
            found.append(Figure(bench_warm._until(tool, size), (value,)))
    return Figures(tuple(found))


def test_the_drawing_has_a_line_a_tool_that_was_measured() -> None:
    ours = {bench_warm._WARM: (0.4, 0.41, 0.42), bench_warm._COMMAND: (0.6, 0.6, 0.6)}
    svg = ET.fromstring(bench_warm.chart(of({**ours, bench_warm._COLD: (40, 41, 42)})))
    lines = svg.findall(f"{SVG}polyline")
    heights = [
        [float(point.split(",")[1]) for point in line.get("points", "").split()] for line in lines
    ]
    assert [len(one) for one in heights] == [3, 3, 3]
    assert max(heights[2]) < min(heights[1]) < min(heights[0]), "more seconds are further up"
    said = [text.text for text in svg.findall(f"{SVG}text")]
    assert {"512 MiB", "8 GiB", "0.5 s", "a cold boot, 42 s"} <= set(said)
    names = [float(t.get("y", "")) for t in svg.findall(f"{SVG}text") if " s" in (t.text or "")[-5:]]
    assert len(names) == len(set(names))


def test_flat_is_the_slowest_size_beside_the_quickest() -> None:
    figures = of({bench_warm._WARM: (0.5, 0.4, 0.48), bench_warm._COMMAND: (0.6, 0.6, 0.6)})
    warm, command = bench_warm._between_sizes(figures.figures)
    assert "512 MiB, the slowest, beside 2 GiB, the quickest" in warm.name
    both = Figures((*figures.figures, warm, command))
    assert both.value(warm) == 0.5 / 0.4 and not both.within(warm)
    assert both.within(command)


def test_names_that_would_lie_upon_each_other_are_moved_apart() -> None:
    tools = {
        name: (1.0, 1.0, 1.0 + n / 1000) for n, name in enumerate((bench_warm._WARM, *bench_warm._PEERS))
    }
    svg = ET.fromstring(bench_warm.chart(of(tools)))
    heights = sorted(
        float(t.get("y", "")) for t in svg.findall(f"{SVG}text") if (t.text or "").endswith(", 1 s")
    )
    assert len(heights) == 4
    assert all(b - a > 15 for a, b in pairwise(heights))


def test_what_others_have_is_a_plain_machine_on_the_same_port(tmp_path: Path) -> None:
    spec = MachineSpec(
        name="kata-prod", owner=Owner(KATA, "prod"), memory=2**29, vcpus=1, disk_size=2**30,
        nic=Nic(mac="52:54:00:00:00:01", mode="user", forwards=(Forward(2222, 22),)),
        seed=tmp_path / "seed.iso", console_log=tmp_path / "log",
    )  # fmt: skip
    xml = domain_xml(spec, tmp_path / "ours", "qcow2", "base@1", kvm=False, system=True)
    peer = bench_warm.as_peer(xml.replace("<metadata>", "<uuid>u</uuid><metadata>"), tmp_path / "theirs")
    assert f'file="{tmp_path / "theirs"}"' in peer
    assert "hostfwd=tcp:127.0.0.1:2222-:22" in peer and "52:54:00:00:00:01" in peer
    for ours in ("memory-backend", "seed.iso", "farm=", "-object", "<log", "kata-prod"):
        assert ours not in peer, ours


def test_a_greeting_is_waited_for_on_new_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            first, _ = server.accept()
            first.close()  # as QEMU does whose guest has no sshd yet
            second, _ = server.accept()
            second.sendall(b"SSH-2.0-x\r\n")
            second.close()

        thread = threading.Thread(target=serve)
        thread.start()
        bench_warm.greeting(server.getsockname()[1])
        thread.join()


def test_time_is_one_parts_alone(tmp_path: Path) -> None:
    """A part that another one calls is not told twice; afterwards all is as it was."""
    parts_of = [(owner, name) for owner, name, _ in bench_warm._parts()]
    before = [inspect.getattr_static(owner, name) for owner, name in parts_of]
    with bench_warm.stopwatch() as parts:
        began = time.perf_counter()
        Journal(tmp_path / "journal.db").unfinished()
        whole = time.perf_counter() - began
    assert 0 <= parts["the journal"] <= whole
    assert sum(parts.values()) <= whole
    assert before == [inspect.getattr_static(owner, name) for owner, name in parts_of]


def test_a_thaw_is_a_part_of_its_own() -> None:
    with bench_warm.stopwatch() as parts:
        machines.guest_agent.thaw([])
    assert parts["thawing"] > 0


def test_what_is_timed_is_called_as_before() -> None:
    """A method that takes no instance too."""
    without = [
        (owner, name)
        for owner, name, _ in bench_warm._parts()
        if isinstance(inspect.getattr_static(owner, name), staticmethod)
    ]
    assert (WarmDomains, "_host_trouble") in without
    with bench_warm.stopwatch():
        for owner, name in without:
            assert isinstance(inspect.getattr_static(owner, name), staticmethod), name
