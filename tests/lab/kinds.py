"""The kinds of lab: what each is made of, and how QEMU boots it. All else is the same for all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LINUX = "console={console} loglevel=4 mitigations=off panic=-1{words}"
# A fixed size for dom0: it would else give memory to guests, and the tests with it.
_XEN = (
    "console=com1 com1=115200,8n1 loglvl=warning guest_loglvl=warning dom0_mem=1536M,max:1536M "
    "dom0_max_vcpus=1-2 bootscrub=0 watchdog=0"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """``files``: directories below this one; of two files of the same name the later one's is taken.
    ``emulated_cpu``, ``emulated_kernel`` (more of its command line; {tsc}: how fast this host's
    time-stamp counter is, in kHz): where there is no KVM for the lab.
    ``newer_cpu``: the same with the QEMU of ``tests.lab.emulator``; empty: it is not for this kind.
    ``marker``: pytest's, of the tests for it. ``parts``: some of them each, as pytest's -k, for a lab of
    its own where all are run; what none of them names is one more."""

    name: str
    title: str
    recipe: str
    files: tuple[str, ...]
    emulated_cpu: str
    emulated_kernel: str
    marker: str
    parts: tuple[str, ...]
    newer_cpu: str = ""

    @property
    def portions(self) -> tuple[str, ...]:
        """All its tests, each in one of them, as pytest's -k."""
        found: list[str] = []
        others: list[str] = []
        for part in self.parts:
            found.append(" and ".join([f"({part})", *others]))
            others.append(f"not ({part})")
        return (*found, " and ".join(others))

    @property
    def hypervisor(self) -> bool:
        """Whether a hypervisor boots, which then boots the kernel."""
        return self.name == "xen"

    def sources(self) -> tuple[Path, ...]:
        """All that an image's hash is of, the recipe first."""
        found: dict[str, Path] = {}
        for directory in self.files:
            found |= {path.name: path for path in (HERE / directory).iterdir()}
        return (HERE / self.recipe, *bases(HERE / self.recipe), *(found[name] for name in sorted(found)))

    def digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.sources():
            digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def boot(self, directory: Path, words: str = "") -> list[str | Path]:
        """QEMU's options that boot an image's kernel. Xen's modules stand with their arguments,
        parted by commas; dom0's kernel is an ELF file, for Xen would take long to unpack it."""
        if not self.hypervisor:
            return [
                "-kernel", directory / "vmlinuz", "-initrd", directory / "initrd",
                "-append", _LINUX.format(console="ttyS0", words=words),
            ]  # fmt: skip
        place = str(directory).replace(",", ",,")
        modules = f"{place}/vmlinux {_LINUX.format(console='hvc0', words=words)},{place}/initrd"
        return ["-kernel", directory / "xen", "-append", _XEN, "-initrd", modules]


def bases(recipe: Path) -> tuple[Path, ...]:
    """The recipe that it adds to, if any."""
    first = next((x for x in recipe.read_text().splitlines() if x.startswith("base: ")), "")
    return (recipe.with_name(first.removeprefix("base: ").strip()),) if first else ()


# Emulation is slow at string instructions byte by byte, at reading a timer chip for the time, and at
# zeroing each page twice: together a quarter of an lvs(8). And what it and Xen 4.17 don't go well
# together with: SMAP crashes dom0; with AVX and XSAVE guests were seen to die now and then.
# The newer QEMU's "max" doesn't boot this kernel. Xen's guests start a sixth slower in it.
# On a busy host a kernel that measures the counter by a timer chip was seen to run five times too fast:
# it is told instead.
_TSC = "tsc=reliable tsc_early_khz={tsc}"
_ERMS = "init_on_alloc=0 clearcpuid=erms,rep_good"
KVM = Kind(
    "kvm", "KVM", "recipe.yaml", ("files",), "max,erms=off", f" {_TSC} {_ERMS}", "lab",
    ("lvm and not guests", "guests or test_walk or test_trouble"), "EPYC,erms=off",
)  # fmt: skip
XEN = Kind(
    "xen", "Xen", "recipe-xen.yaml", ("files", "files-xen"),
    "max,erms=off,smap=off,rdtscp=off,xsave=off,avx=off,avx2=off", " init_on_alloc=0", "xen",
    ("pv-lvm or pvh", "lvm"),
)  # fmt: skip
KINDS = {kind.name: kind for kind in (KVM, XEN)}
