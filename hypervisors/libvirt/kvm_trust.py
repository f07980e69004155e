"""What guests have shown of this machine's KVM since it booted, beside what was tried beforehand
(``hypervisors.libvirt.kvm``).

Once a guest of ours has answered, KVM runs guests here, and one that shows nothing has another reason.
Where none ever did and one shows nothing at all, KVM is what is most likely at fault.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from host.documents import read_file
from host.files import write_note
from host.processes import boot_id
from hypervisors.libvirt.kvm import distrust_kvm
from inventory.errors import FarmhandError


@dataclass(frozen=True, slots=True)
class KvmTrust:
    """What guests have shown of this machine's KVM, since it booted and for this user. ``cache``: the
    directory that notes and verdicts are kept in."""

    cache: Path

    def proven(self) -> bool:
        """Whether a guest has answered under KVM."""
        with contextlib.suppress(OSError, ValueError):
            return read_file(self._note).decode() == boot_id()
        return False

    def prove(self) -> None:
        """Note that a guest has answered under KVM."""
        if not self.proven():
            with contextlib.suppress(OSError, FarmhandError):  # as with verdicts
                write_note(self._note, boot_id())

    def distrust(self, why: str) -> None:
        """Note that KVM failed a guest. Drivers opened from now on do without it."""
        distrust_kvm(self.cache, why)

    @property
    def _note(self) -> Path:
        return self.cache / f"kvm-answered-{os.geteuid()}"
