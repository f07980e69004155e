"""What a second farm is asked to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

OTHERS = "--as ANOTHER, or another --hostname or --address for the VM"
"""The remedy where something of it is taken."""


@dataclass(frozen=True, slots=True)
class TwinEndpoint:
    """Where a VM's twin is. ``port``: of its ssh; None: as the first one's."""

    address: IPv4Address
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinAsked:
    """``name``: the new farm's. ``out``: its file. What is absent is chosen. ``range``: the first and
    last address of the subnet that are to be its. ``endpoints``, ``hostnames``: by VM. ``shift``: what
    is added to each port."""

    name: str
    out: Path
    revision: str = ""
    subnet: IPv4Network | None = None
    range: tuple[IPv4Address, IPv4Address] | None = None
    endpoints: Mapping[str, TwinEndpoint] = field(default_factory=dict)
    hostnames: Mapping[str, str] = field(default_factory=dict)
    shift: int | None = None
