"""Who a VM is: its host key, its first-boot data, and whose keys may log in.

A VM's host key is made once and kept with its seed image: after a reset it comes up as itself. The
machine-id follows from the host key, so a VM destroyed and cloned again is a new one. A clone that
nobody tells anything at its first boot (``firstboot: none``) has neither: it keeps its image's host key,
which is learnt at its first start.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from host.documents import Malformed, damaged, read_file
from host.files import make_directory, remove, remove_for_good, write_atomic
from host.paths import FarmPaths
from host.run import Runner
from hypervisors.console_log import files_of, move
from inventory.errors import NotFound, UsageError
from inventory.model import Farm
from provision.allocate import Allocation

if TYPE_CHECKING:
    from provision.guest.seed import SeedData

_KEY_TYPES = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")
_making = threading.Lock()

_HOST_KEYS = "hostkeys"


def controller_key(farm: Farm, paths: FarmPaths) -> Path:
    """The private key that logs in on the farm's VMs: the farm file's, or the farm's own.

    The farm's own may not exist yet: ``make_controller_key``."""
    if farm.ssh.key is None:
        return paths.keys / "id_ed25519"
    return _beside(farm, farm.ssh.key)


def no_key(farm: Farm, template: str) -> UsageError:
    """What is wrong with the VMs of such a template; see ``Farm.locked_templates``."""
    return UsageError(
        f"{farm.path.name or farm.farm}: template {template} has 'firstboot: none', so nobody tells its "
        "VMs whose key to let in, and there is no 'ssh: key:'",
        remedy="set that to a private key that its image lets in already",
    )


def make_controller_key(farm: Farm, paths: FarmPaths) -> Path:
    """Path of the private key that logs in, which is made now if it is the farm's own and missing.
    NotFound if the farm file names one that doesn't exist."""
    key = controller_key(farm, paths)
    with _making:
        if key.exists():
            return key
        if farm.ssh.key is not None:
            raise NotFound(
                f"{farm.path.name or farm.farm}: ssh.key {key} does not exist",
                remedy=f"make it (ssh-keygen -t ed25519 -f {key}) or leave 'key' out",
            )
        _write_pair(key, f"farmhand {farm.farm}")
    return key


def public_key(private: Path) -> str:
    """The public half of a private key, read from the file beside it, else (it is lost, or damaged)
    computed. UsageError if neither works."""
    return _written(private) or _public_half(private)


def _written(private: Path) -> str:
    """The public half in the file beside it; "" where that holds no public key, and nothing else."""
    with contextlib.suppress(OSError, ValueError):
        text = read_file(_public_file(private)).decode().strip()
        kind, key, *_ = text.split(maxsplit=2)
        if text.isprintable() and kind.startswith(_KEY_TYPES) and _names(key, kind):
            return text
    return ""


def _names(key: str, kind: str) -> bool:
    """Whether the base64 text begins with the name of that kind, as a key does (RFC 4253, 6.6)."""
    data, name = base64.b64decode(key, validate=True), kind.encode()
    return data.startswith(len(name).to_bytes(4) + name) and len(data) > len(name) + 8


def _public_half(private: Path) -> str:
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
        encoded = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the public half of {private} can't be had: {error}",
            remedy=f"write it beside: ssh-keygen -y -f {private} > {private}.pub",
        ) from error
    return encoded.decode()


def host_key_file(paths: FarmPaths, vm: str) -> Path:
    """Path of the VM's private host key, whether it is there or not."""
    return paths.keys / _HOST_KEYS / vm


def host_key(paths: FarmPaths, vm: str) -> str:
    """The public half of the VM's host key, "ssh-ed25519 AAAA..."; "" if the VM has none yet. If its
    file is lost, it is computed from the private half: no other key is ever trusted instead."""
    file = host_key_file(paths, vm)
    written = _written(file)
    if not written and not os.path.lexists(file):
        return ""
    return " ".join((written or _public_half(file)).split()[:2])


def make_host_key(paths: FarmPaths, vm: str, machine: str) -> bool:
    """Make the VM's host key, unless it has one. Returns whether it was made now. The public half is
    written first, so that a private half alone always means that the other one was lost."""
    file = host_key_file(paths, vm)
    with _making:
        if new := not os.path.lexists(file):
            _write_pair(file, machine)
        else:
            _keep(_public_file(file), f"{host_key(paths, vm)} {machine}\n")
        write_known_hosts(paths, vm, machine, host_key(paths, vm))
    return new


def known_hosts(paths: FarmPaths, vm: str) -> Path:
    """Path of the VM's known_hosts file for the OpenSSH client. It names the VM by its machine
    (HostKeyAlias), so that the port doesn't matter. Each VM has a file of its own: one VM more rewrites
    nothing."""
    return paths.keys / _HOST_KEYS / f"{vm}.known"


def write_known_hosts(paths: FarmPaths, vm: str, machine: str, key: str) -> None:
    """Write the VM's known_hosts file, unless it is right already. ``key``: its ``host_key``."""
    _keep(known_hosts(paths, vm), f"{machine} {key}\n")


def learnt_hosts(paths: FarmPaths, vm: str) -> Path:
    """Path of the known_hosts file of a VM that keeps its image's host key: empty until that is
    learnt."""
    return paths.keys / _HOST_KEYS / f"{vm}.learnt"


def keeps_own_key(paths: FarmPaths, vm: str) -> bool:
    """Whether the VM was cloned as one that nobody gives a host key."""
    return learnt_hosts(paths, vm).exists()


def expect_own_key(paths: FarmPaths, vm: str, *, own: bool) -> None:
    """Note, while it is cloned, whether the VM keeps its image's host key."""
    file = learnt_hosts(paths, vm)
    if not own:
        remove(file)
    elif not file.exists():
        _make_key_directory(file.parent)
        write_atomic(file, b"", mode=0o600)


def remove_identity(paths: FarmPaths, vm: str, machine: str) -> bool:
    """Remove seed, host key and console logs of a VM that is no more. Returns whether there was
    anything."""
    file, log = host_key_file(paths, vm), console_log(paths, machine)
    gone = [
        remove(path)
        for path in (
            seed_file(paths, machine),
            _fingerprint_file(paths, machine),
            file,
            _public_file(file),
            known_hosts(paths, vm),
            *files_of(log),
            learnt_hosts(paths, vm),
            paths.untold / vm,
        )
    ]
    return any(gone)


def rename_identity(paths: FarmPaths, vm: str, machine: str, *, to: str, to_machine: str) -> None:
    """Give host key and console logs of a VM to another, which has none. Its seed stays, for as long as
    its machine may be started by it. Safe to do again, and the other way round."""
    private, learnt = host_key_file(paths, vm), learnt_hosts(paths, vm)
    for old, new in ((private, host_key_file(paths, to)), (learnt, learnt_hosts(paths, to))):
        with contextlib.suppress(FileNotFoundError):
            old.replace(new)
    if (known := learnt_hosts(paths, to)).exists():
        lines = read_file(known).decode(errors="replace").splitlines(keepends=True)
        renamed = (re.sub(rf"^{re.escape(machine)}(?=[ ,])", to_machine, line) for line in lines)
        write_atomic(known, "".join(renamed).encode(), mode=0o600)
    move(console_log(paths, machine), console_log(paths, to_machine))


def sweep_seeds(paths: FarmPaths, machines: Collection[str]) -> None:
    """Remove what killed writers of these machines' seeds left. The caller holds the VMs' locks."""
    for path in paths.seeds.glob(".*"):
        if path.name.lstrip(".").split(".")[0] in machines:
            remove_for_good(path)


def seed_file(paths: FarmPaths, machine: str) -> Path:
    """Path of the machine's seed image, whether it is there or not."""
    return paths.seeds / f"{machine}.iso"


def console_log(paths: FarmPaths, machine: str) -> Path:
    """Path of the machine's console log, whether it is there or not."""
    return paths.consoles / f"{machine}.log"


def authorized(farm: Farm, entries: Sequence[str]) -> tuple[str, ...]:
    """The public keys that the entries are or name: keys themselves, and files of keys, relative to the
    farm file."""
    keys: list[str] = []
    for entry in entries:
        if entry.startswith(_KEY_TYPES):
            keys.append(entry.strip())
            continue
        file = _beside(farm, Path(entry))
        try:
            lines = read_file(file).decode().splitlines()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text file"
            raise NotFound(
                f"{farm.path.name or farm.farm}: no public keys from {file}: {why}",
                remedy="give a public key itself, or a file that holds some",
            ) from error
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return tuple(dict.fromkeys(keys))


def refresh_seed(
    farm: Farm,
    paths: FarmPaths,
    runner: Runner,
    allocation: Allocation,
    *,
    reader_uid: int | None,
) -> bool:
    """Write the VM's seed image if it is missing or no longer says what the farm file does. Returns
    whether it was written."""
    data = seed_data(farm, paths, allocation)
    machine = farm.machine_of(allocation.vm)
    fingerprint = hashlib.sha256(repr((data, reader_uid)).encode()).hexdigest()
    image, note = seed_file(paths, machine), _fingerprint_file(paths, machine)
    with contextlib.suppress(OSError, Malformed):
        if image.is_file() and read_file(note) == fingerprint.encode():
            return False
    from provision.guest.seed import write_seed

    make_directory(paths.seeds, mode=0o711)
    remove(note)
    write_seed(runner, data, image, reader_uid=reader_uid)
    write_atomic(note, fingerprint.encode(), mode=0o600)
    return True


def seed_data(farm: Farm, paths: FarmPaths, allocation: Allocation) -> SeedData:
    """What the VM is told at its first boot. Its host key and the controller's must exist already."""
    from provision.guest.seed import SeedData, StaticAddress

    vm, network = allocation.vm, farm.network
    machine = farm.machine_of(vm)
    private, public = _private(host_key_file(paths, vm)), host_key(paths, vm)
    digest = hashlib.sha256(f"{machine} {public}".encode()).hexdigest()
    static = None
    if network.mode == "user":
        # QEMU's own network is always this one, and its port forwards go to .15 (qemu(1), -netdev
        # user): asking DHCP for it takes an emulated guest seconds.
        static = StaticAddress(
            address=IPv4Address("10.0.2.15"),
            prefix=24,
            gateway=IPv4Address("10.0.2.2"),
            nameservers=(IPv4Address("10.0.2.3"),),
        )
    elif allocation.address and network.subnet and network.addressing == "static":
        static = StaticAddress(
            address=allocation.address,
            prefix=network.subnet.prefixlen,
            gateway=network.gateway,
            nameservers=network.nameservers,
        )
    own = public_key(controller_key(farm, paths))
    return SeedData(
        vm=vm,
        instance_id=f"{machine}-{digest[:12]}",
        hostname=farm.hostname_of(vm),
        machine_id=digest[:32],
        host_key=private,
        host_key_pub=public,
        login=farm.ssh.user,
        authorized_keys=tuple(dict.fromkeys((own, *authorized(farm, farm.ssh.authorized_keys)))),
        users={name: authorized(farm, entries) for name, entries in farm.ssh.users.items()},
        sudo=farm.ssh.sudo,
        mac=allocation.mac,
        static=static,
        domain=network.domain,
    )


def _private(file: Path) -> str:
    try:
        return read_file(file).decode("ascii")
    except (OSError, ValueError) as error:
        remedy = "put it back from a backup, or destroy and clone the VM: it is another one then"
        raise damaged(file, "a VM's host key", error, remedy) from error


def _make_key_directory(directory: Path) -> None:
    """``keys``, or ``keys/hostkeys`` with it: both for us alone."""
    if directory.name == _HOST_KEYS:
        make_directory(directory.parent, mode=0o700)
    make_directory(directory, mode=0o700)


def _write_pair(private: Path, comment: str) -> None:
    from provision.guest.seed import new_host_key

    _make_key_directory(private.parent)
    secret, public = new_host_key(Runner(), private.parent)
    public = " ".join([*public.split()[:2], comment])
    write_atomic(_public_file(private), f"{public}\n".encode())
    write_atomic(
        private, secret.encode() if secret.endswith("\n") else f"{secret}\n".encode(), mode=0o600
    )


def _public_file(private: Path) -> Path:
    return private.with_name(f"{private.name}.pub")


def _keep(path: Path, text: str) -> None:
    """Write the file, unless this is its text already."""
    with contextlib.suppress(OSError, Malformed):
        if read_file(path) == text.encode():
            return
    write_atomic(path, text.encode())


def _fingerprint_file(paths: FarmPaths, machine: str) -> Path:
    return paths.seeds / f"{machine}.sum"


def _beside(farm: Farm, path: Path) -> Path:
    path = Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for unknown users
    return path if path.is_absolute() else farm.path.parent / path
