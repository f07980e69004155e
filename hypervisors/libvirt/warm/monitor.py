"""QEMU's monitor through libvirt, for what libvirt has no call for (docs/interop/qemu-qmp-ref)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypervisors.answers import answer_of
from inventory.errors import DriverFailed

if TYPE_CHECKING:
    import libvirt

_LOOK = 0.001  # seconds
_SLOWER = 0.01


class Monitor:
    """Of a running domain. libvirtError if it runs no more."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        self.domain = domain

    def run(self, command: str, /, *, file: int | None = None, **arguments: object) -> Any:
        """``file``: a descriptor that QEMU gets a copy of. DriverFailed with QEMU's words."""
        import libvirt_qemu

        order: dict[str, object] = {"execute": command}
        if arguments:
            order["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps(order)
        if file is None:
            answer = libvirt_qemu.qemuMonitorCommand(self.domain, text, 0)
        else:
            answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self.domain, text, [file], 0)
        with answer_of("QEMU"):
            found = json.loads(answer)
            if "error" in found:
                raise DriverFailed(f"{self.domain.name()}: QEMU: {found['error']['desc']}")
            return found["return"]

    def migration(self) -> dict[str, Any]:
        found: dict[str, Any] = self.run("query-migrate")
        return found

    def comes_to(self, wanted: str, alive: Callable[[], None] = lambda: None) -> bool:
        """Whether its migration is ``wanted`` by now. ``alive``: called unless it is; it may raise.
        DriverFailed if it failed."""
        seen = self.migration()
        status = seen.get("status", "")
        if status == wanted:
            return True
        alive()
        if status in ("failed", "cancelled") or (status == "cancelling" and wanted != "cancelled"):
            raise DriverFailed(
                f"{self.domain.name()}: QEMU {status} its migration"
                + (f": {seen['error-desc']}" if "error-desc" in seen else "")
            )
        return False

    def wait(self, wanted: str, *, limit: float, alive: Callable[[], None] = lambda: None) -> bool:
        """Wait until its migration is ``wanted``; False if it isn't after ``limit`` seconds. ``alive``,
        errors: see ``comes_to``."""
        began = time.monotonic()
        while not self.comes_to(wanted, alive):
            gone = time.monotonic() - began
            if gone > limit:
                return False
            time.sleep(_LOOK if gone < 1 else _SLOWER)
        return True
