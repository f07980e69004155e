"""The definition that a machine runs on with: the one of its checkpoint's moment, for all that its guest
sees, and what the host may have changed since."""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path

from hypervisors.libvirt.domain_xml import MEMORY_ID, QEMU_URI, memory_object

_COMMANDLINE, _ARG = f"{{{QEMU_URI}}}commandline", f"{{{QEMU_URI}}}arg"
_INCOMING = ("-incoming", "defer")


def resumed(then: str, now: str, disk: Path, memory: Path, size: int) -> str:
    """The XML to start with. ``then``: of the running machine at the checkpoint. ``now``: its
    definition; the marks, the network's ports and the console's log are that one's. ``memory``: the file
    that QEMU maps privately, of ``size`` bytes."""
    old = ET.fromstring(then)  # noqa: S314 - from libvirt, which has parsed and rewritten it; sealed since
    new = ET.fromstring(now)  # noqa: S314
    for tag in ("name", "uuid"):
        _find(old, tag).text = new.findtext(tag)
    if (metadata := old.find("metadata")) is not None:
        old.remove(metadata)
    old.insert(2, _find(new, "metadata"))
    place = _find(old, "devices/disk[@device='disk']")
    source = _find(place, "source")
    source.set("dev" if "dev" in source.attrib else "file", str(disk))
    source.attrib.pop("index", None)
    seed, seed_now = (one.find("devices/disk[readonly]/source") for one in (old, new))
    if seed is not None and seed_now is not None:  # of a machine that was renamed since
        seed.set("file", seed_now.get("file", ""))
    for one in old.iterfind("devices/disk"):
        for chain in one.findall("backingStore"):  # of that moment: libvirt looks anew
            one.remove(chain)
    _take_over(old, new, "devices/serial/log", "file")
    if (genid := old.find("genid")) is not None:  # another one: the guest's random pool is seeded anew
        genid.text = str(uuid.uuid4())
    line, netdevs = _find(old, _COMMANDLINE), _arguments(new)
    arguments = _arguments(old)
    for number, argument in enumerate(arguments):
        before = arguments[number - 1] if number else ""
        if before == "-object" and f"id={MEMORY_ID}," in argument:
            arguments[number] = memory_object(size, memory)
        elif before == "-netdev" and "-netdev" in netdevs:
            arguments[number] = netdevs[netdevs.index("-netdev") + 1]
    for child in line.findall(_ARG):
        line.remove(child)
    for argument in (*_without(arguments, _INCOMING), *_INCOMING):
        ET.SubElement(line, _ARG, value=argument)
    return ET.tostring(old, encoding="unicode")


def has_memory_object(xml: str) -> bool:
    """Whether a running machine's memory has the name that an image needs."""
    return any(f"id={MEMORY_ID}," in argument for argument in _arguments(ET.fromstring(xml)))  # noqa: S314


def memory_file(xml: str) -> Path | None:
    """The file that a running machine's memory is mapped from, if it is."""
    of = next((one for one in _arguments(ET.fromstring(xml)) if f"id={MEMORY_ID}," in one), "")  # noqa: S314
    found = re.search(r"\bmem-path=((?:[^,]|,,)+)", of)
    return Path(found[1].replace(",,", ",")) if found else None


def file_guard(capabilities: str) -> str:
    """What keeps QEMU from files that libvirt doesn't know of, such as a memory of ours: "apparmor" or
    "selinux"; "" if nothing does. ``capabilities``: libvirt's, of the host."""
    host = ET.fromstring(capabilities)  # noqa: S314 - libvirt's own
    models = {model.text for model in host.iterfind("host/secmodel/model")}
    return next((name for name in ("apparmor", "selinux") if name in models), "")


def is_incoming(xml: str) -> bool:
    """Whether a running machine was started to be given its memory back."""
    return _INCOMING[0] in _arguments(ET.fromstring(xml))  # noqa: S314


def runs_on(xml: str) -> dict[str, str]:
    """What of a running machine's definition must be the same where it runs on."""
    domain = ET.fromstring(xml)  # noqa: S314
    return {
        "accelerator": domain.get("type", ""),
        "machine": _find(domain, "os/type").get("machine", ""),
    }


def _without(arguments: list[str], pair: tuple[str, str]) -> list[str]:
    """Of a machine that was itself resumed."""
    kept = list(arguments)
    while pair[0] in kept:
        at = kept.index(pair[0])
        del kept[at : at + 2]
    return kept


def _arguments(domain: ET.Element) -> list[str]:
    return [argument.get("value", "") for argument in domain.iterfind(f"{_COMMANDLINE}/{_ARG}")]


def _take_over(old: ET.Element, new: ET.Element, path: str, attribute: str) -> None:
    there, here = new.find(path), old.find(path)
    if there is not None and here is not None:
        here.set(attribute, there.get(attribute, ""))


def _find(parent: ET.Element, path: str) -> ET.Element:
    found = parent.find(path)
    assert found is not None, f"definitions of ours have {path}"
    return found
