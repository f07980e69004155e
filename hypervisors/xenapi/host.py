"""Hosts of driver xenapi: their section and its opening."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from hypervisors.api import Disks, Hypervisor, Leases
from hypervisors.host import DrivenHost, OpenHost, Surroundings
from inventory.base import at_key
from inventory.hosts import DriverInfo

if TYPE_CHECKING:  # for the annotations, which inventory has evaluated
    from inventory.fields import Bool, FilePath, Line, ServedName, Size


@dataclass(frozen=True, kw_only=True)
class XenApiHost(DrivenHost):
    """A server with Xen's management API, or a pool of them: XCP-ng, XenServer."""

    INFO: ClassVar = DriverInfo(
        name="xenapi", called="a xenapi host", user_mode=False, any_network_name=True,
        kernel_boot=False, mac_prefix="00:16:3e", modules=("XenAPI",),
    )  # fmt: skip
    KEYS: ClassVar = {"copy_mode": "copy"}
    NEEDED: ClassVar = {"uri": "an https URL", "credentials": "a file"}
    INSTEAD: ClassVar = {"disks": "a xenapi server owns its storage: 'sr' names it"}

    driver: Literal["xenapi"] = "xenapi"
    uri: Line
    """The server's XenAPI, an https URL; of a pool, its coordinator's."""
    credentials: FilePath
    """A file (relative to the farm file, readable by its owner alone) with the user's name on its first
    line and the password on its second."""
    ca: FilePath | None = None
    """The PEM file of the CA, or the certificate itself, that the server's certificate is checked by.
    Absent, without `fingerprint` and `insecure`: the system's CAs."""
    fingerprint: Line | None = None
    """The SHA-256 of the server's certificate, 64 hexadecimal digits, instead of a CA."""
    insecure: Bool = False
    """Whoever answers is believed. Every command warns of it."""
    sr: ServedName | None = None
    """The name of the storage repository; absent: the pool's default."""
    copy_mode: Literal["linked", "full"] = "linked"
    """`full` makes disks that share nothing with their template (VM.copy), in `sr`."""
    memory: Size | None = None
    """What this farm's VMs may have of the host's memory, all together, at any time; absent: no limit of
    ours. Of several farms on a host each keeps to its own."""

    def __post_init__(self) -> None:
        if not self.uri.startswith("https://"):
            raise at_key("uri", f"driver xenapi needs 'uri', {self.NEEDED['uri']}")
        if "@" in urlsplit(self.uri).netloc:  # and every message that names the server would tell it
            raise at_key("uri", "no user or password belongs in 'uri': 'credentials' names their file")
        given = {"ca": self.ca, "fingerprint": self.fingerprint, "insecure": self.insecure or None}
        trust = [key for key, value in given.items() if value is not None]
        if len(trust) > 1:
            raise at_key(trust[1], f"either '{trust[0]}' or '{trust[1]}', not both", trust[0])
        if self.fingerprint is not None and not re.fullmatch(
            r"[0-9A-Fa-f]{64}|([0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2}", self.fingerprint
        ):
            raise at_key("fingerprint", "a SHA-256 has 64 hexadecimal digits, colons between or not")

    def opened(self, around: Surroundings) -> OpenXenApi:
        return OpenXenApi(self, around)


class OpenXenApi(OpenHost):
    """One connection for machines and disks, which are the server's."""

    def __init__(self, declared: XenApiHost, around: Surroundings) -> None:
        super().__init__(around)
        self._declared = declared

    def _connect(self) -> Hypervisor:
        from hypervisors.xenapi.disks import XenApiDisks
        from hypervisors.xenapi.driver import XenApiHypervisor

        served = self.disks()
        assert isinstance(served, XenApiDisks)
        return XenApiHypervisor(served, step=self.around.callbacks.step)

    def _open_disks(self) -> Disks:
        from hypervisors.xenapi.disks import XenApiDisks
        from hypervisors.xenapi.notes import Notes
        from hypervisors.xenapi.pool import Pool
        from hypervisors.xenapi.session import Sessions, XenApiServer

        declared, around, beside = self._declared, self.around, self.around.beside
        if declared.insecure:
            around.callbacks.warn(
                f"host {around.host}: 'insecure': whoever answers at {declared.uri} gets the password"
            )
        server = XenApiServer(
            url=declared.uri,
            credentials=beside / declared.credentials.expanduser(),
            ca=beside / declared.ca.expanduser() if declared.ca else None,
            fingerprint=declared.fingerprint or "",
            insecure=declared.insecure,
            turns=self._turns(),
        )
        pool = Pool(
            Sessions(server), around.farm, sr=declared.sr or "", copy=declared.copy_mode == "full",
            progress=lambda what, part: around.callbacks.working(f"{what}: {part:.0%}"),
            notes=Notes(around.directories.farm / f"xenapi-{around.host}", plan=around.plan),
            warn=around.callbacks.warn,
        )  # fmt: skip
        return XenApiDisks(pool, around.runner, step=around.callbacks.step)

    def leases(self) -> Sequence[Leases]:
        from hypervisors.xenapi.disks import XenApiDisks
        from hypervisors.xenapi.leases import PoolLeases

        served = self.disks()
        assert isinstance(served, XenApiDisks)
        working = self.around.callbacks.working
        return (PoolLeases(self._declared.uri, served.pool.sessions, working),)

    def _turns(self) -> Path:
        """The lock of all this user's commands for one storage repository, whatever their farms."""
        repository = f"{self._declared.uri.rstrip('/')} {self._declared.sr or ''}"
        name = hashlib.sha256(repository.encode()).hexdigest()[:16]
        return self.around.directories.state / f"xenapi-{name}.lock"
