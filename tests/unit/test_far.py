"""Another machine's drivers, over a real ssh: what is special to the way between. What they do is held
to by the contract suites."""

from __future__ import annotations

import inspect
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from host.run import which
from hypervisors.api import (
    Callbacks,
    Capacity,
    Checkpoint,
    DeviceDisks,
    Disk,
    FarmDisks,
    Machine,
    MachineSpec,
    MergingDisks,
    Nic,
    Owner,
    Power,
    Template,
    WatchedDisks,
)  # fmt: skip
from hypervisors.disks.stores import StorePlace
from hypervisors.disks.zfs.disks import ZfsDisks
from hypervisors.far.address import far, is_far
from hypervisors.far.drivers import FarDisks, far_disks
from hypervisors.far.failures import on
from hypervisors.far.link import Link
from hypervisors.far.parcel import parcel
from hypervisors.far.wire import decode, encode
from hypervisors.libvirt.kvm_trust import KvmTrust
from hypervisors.libvirt.opening import Place
from inventory.errors import (
    Call,
    CommandFailed,
    Conflict,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NoSpace,
    NotFound,
    Unsupported,
    UsageError,
)  # fmt: skip
from tests.contract.far_rig import FarMachine
from tests.identities import KATA, identity
from tests.unit.sshd_machine import make_key, wait_for

OWNER = Owner(KATA, "prod")
SIZE = 16 * 2**20


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FarMachine]:
    with FarMachine(tmp_path) as made:
        yield made


def template() -> Template:
    return Template(name="base", generation=1, ref="", size=SIZE, sha256="", created=datetime.now(UTC),
                    origin="test", firstboot="none")  # fmt: skip


def image(directory: Path) -> Path:
    path = directory / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    return path


# -- values ---------------------------------------------------------------------------------------


def test_values_come_over_as_they_are() -> None:
    now = datetime.now(UTC)
    disk = Disk(machine="m", owner=OWNER, path=Path("/dev/x"), format="raw", size=1, used=2,
                template="t@1", base="clean",
                checkpoints=(Checkpoint(name="clean", created=now),))  # fmt: skip
    machine = Machine(name="m", owner=None, power=Power.PAUSED, memory=1, current=1, vcpus=1, mac="",
                      disk=None, spec_hash="", template="", started=now)  # fmt: skip
    spec = MachineSpec(name="m", owner=OWNER, memory=1, vcpus=1, disk_size=1, seed=Path("s"),
                       nic=Nic(mac="", mode="user"), address=IPv4Address("10.0.0.1"))  # fmt: skip
    for value in (disk, machine, spec, None, 1.5, "text", {"a": Capacity(1, 2)}, (disk, ("x", True))):
        assert decode(encode(value)) == value
        assert type(decode(encode(value))) is type(value)
    assert decode(encode(machine)).power is Power.PAUSED


def test_errors_come_over_with_all_that_they_say() -> None:
    failed = CommandFailed("zfs exited", argv=("zfs", "list"), status=2, stderr="no", detail="$ zfs")
    for error in (failed, Conflict("taken", remedy="another"), NotFound("gone")):
        back = decode(encode(error))
        assert type(back) is type(error)
        assert (str(back), vars(back)) == (str(error), vars(error))


def test_only_a_drivers_values_come_over() -> None:
    with pytest.raises(TypeError):
        encode(object())
    text = {"": {"message": "x"}}
    for forged in ({"!SystemExit": text}, {"Popen": {}}, {"!Mapping": text}):
        with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
            decode(forged)


# -- addresses ------------------------------------------------------------------------------------


def test_an_address_is_ssh_s() -> None:
    there = far("xen+ssh://root@dom0.lan:2222/system?keyfile=/k%20y")
    assert (there.name, there.uri) == ("root@dom0.lan", "xen:///system")
    argv = there.argv(("python3", "-c", "a b"))
    assert argv[0] == "ssh" and argv[-3:] == ("--", "dom0.lan", "python3 -c 'a b'")
    assert "BatchMode=yes" in argv
    for words in (["-p", "2222"], ["-l", "root"], ["-o", 'IdentityFile="/k y"']):
        assert any(list(argv[n : n + 2]) == words for n in range(len(argv)))
    assert far("qemu+ssh://h/system?socket=/run/s").uri == "qemu+unix:///system?socket=/run/s"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("qemu+tls://host/system", "reached by ssh alone"),
        ("xen+ssh://root@-oProxyCommand=x/system", "no user and host"),
        ("xen+ssh://-lx@host/system", "no user and host"),
        ("xen+ssh://host/system?no_verify=1", "'no_verify' is not understood"),
        ("xen+ssh://host:port/system", "no port"),
    ],
)
def test_what_is_no_address_is_refused(uri: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        far(uri)


@pytest.mark.parametrize("uri", ["private", "qemu:///system", "qemu+unix:///system?socket=/x"])
def test_this_machine_is_not_far(uri: str) -> None:
    assert not is_far(uri)


# -- calls ----------------------------------------------------------------------------------------


def test_a_store_offers_there_what_it_offers_here() -> None:
    def offers(store: str) -> set[str]:
        place = Place(disks=StorePlace(farm=KATA, store=store), driver="xen", uri="xen:///system")
        made = far_disks(Link("x", tuple, place, Callbacks()), lambda _: None)
        assert isinstance(made, FarDisks)
        more = (FarmDisks, DeviceDisks, WatchedDisks, MergingDisks)
        return {protocol.__name__ for protocol in more if isinstance(made, protocol)}

    assert offers("qcow2") == {"FarmDisks"}
    assert "DeviceDisks" in offers("lvm-thin") and "WatchedDisks" in offers("lvm-thin")
    assert "MergingDisks" in offers("lvm")


def test_a_disk_is_made_there(machine: FarMachine, tmp_path: Path) -> None:
    steps: list[str] = []
    disks = machine.disks(KATA, steps.append)
    sent = image(tmp_path)
    sealed = disks.seal(sent, template())
    assert not sent.exists()
    disk = disks.clone(sealed, "kata-prod", OWNER, SIZE)
    assert disk.path.is_relative_to(machine.state) and disk.path.exists()
    assert steps and not list(machine.state.rglob("incoming/*"))
    with pytest.raises(Conflict):
        disks.clone(sealed, "kata-prod", OWNER, SIZE)
    with pytest.raises(NotFound):
        disks.restore("kata-prod", "never")


def test_what_zfs_runs_comes_over_too(machine: FarMachine) -> None:
    """A stand-in for the command keeps what it is given to run; the real one is in the labs."""
    zfs = machine.place / "bin" / "zfs"
    zfs.parent.mkdir(exist_ok=True)
    zfs.write_text(
        '#!/bin/sh\nwhile [ "$1" != tank ]; do shift; done\n'
        f'cat -- "$2" >{machine.place}/given || exit 1\n'
        """echo '{"return": {"space": {"used": 1, "available": 2}}}'\n"""
    )
    zfs.chmod(0o755)
    disks = machine.disks(KATA, store="zfs", pool="tank")
    assert disks.capacity() == Capacity(3, 2)
    given, ours = machine.place / "given", Path(inspect.getfile(ZfsDisks)).with_name("store.lua")
    assert given.read_bytes() == ours.read_bytes()


def test_a_step_that_raises_abandons_the_change(machine: FarMachine, tmp_path: Path) -> None:
    sealed = machine.disks(KATA).seal(image(tmp_path), template())

    def stop(text: str) -> None:
        raise Interrupted(text)

    disks = machine.disks(KATA, stop)
    with pytest.raises(Interrupted):
        disks.clone(sealed, "kata-prod", OWNER, SIZE)
    assert disks.find("kata-prod") is None and not disks.leftovers()


def test_a_change_waits_until_its_step_was_noted(machine: FarMachine, tmp_path: Path) -> None:
    sealed = machine.disks(KATA).seal(image(tmp_path), template())
    other = machine.disks(KATA)

    def look(_: str) -> None:
        time.sleep(0.2)
        seen.append(other.find("kata-prod"))

    seen: list[Disk | None] = []
    machine.disks(KATA, look).clone(sealed, "kata-prod", OWNER, SIZE)
    assert seen[0] is None and other.find("kata-prod")


def test_a_plan_changes_nothing_there(machine: FarMachine, tmp_path: Path) -> None:
    sealed = machine.disks(KATA).seal(image(tmp_path), template())
    machine.disks(KATA).clone(sealed, "kata-prod", OWNER, SIZE)
    planning = machine.link(KATA, plan=True)
    assert planning.call("disks", "find", "kata-prod")
    fresh = machine.link(identity("other"), plan=True)
    assert fresh.call("disks", "list") == ()
    assert not (machine.state / "farms" / "other").exists()


def test_a_lost_connection_is_an_error_and_the_next_call_makes_another(
    machine: FarMachine, tmp_path: Path
) -> None:
    sealed = machine.disks(KATA).seal(image(tmp_path), template())
    cut = threading.Event()

    def lose(_: str) -> None:
        if not cut.is_set():
            cut.set()
            machine.sshd.cut()
            time.sleep(1)

    disks = machine.disks(KATA, lose)
    with pytest.raises(DriverFailed, match=r"connection to 127\.0\.0\.1 was lost") as lost:
        disks.clone(sealed, "kata-prod", OWNER, SIZE)
    assert "run the command again" in lost.value.remedy
    assert disks.clone(sealed, "kata-prod", OWNER, SIZE).path.exists()


def test_many_calls_at_once(machine: FarMachine, tmp_path: Path) -> None:
    disks = machine.disks(KATA)
    sealed = disks.seal(image(tmp_path), template())
    names = [f"kata-vm{n}" for n in range(12)]
    threads = [
        threading.Thread(target=disks.clone, args=(sealed, name, Owner(KATA, name[5:]), SIZE))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(disk.machine for disk in disks.list()) == sorted(names)


def test_an_agent_ends_with_its_asker(machine: FarMachine, tmp_path: Path) -> None:
    link = machine.link(KATA)
    assert link.call("disks", "list") == ()
    [presence] = (machine.place / "run").rglob("far-*")
    pid = int(presence.name.removeprefix("far-"))
    link._line._process.send_signal(signal.SIGKILL)  # ssh's, as if we were killed
    wait_for(lambda: not Path(f"/proc/{pid}/stat").exists())
    assert machine.link(KATA).call("disks", "list") == ()
    assert len(list((machine.place / "run").rglob("far-*"))) == 1, "the dead one's is swept"


def test_an_agent_waits_for_one_that_does_not_know_yet_that_it_is_alone(machine: FarMachine) -> None:
    """A dead network: nobody tells the other end."""
    alone = machine.link(KATA, spoil="import hypervisors.far.agent as a; a.SILENCE = 4.0")
    alone.call("disks", "list")
    ssh = alone._line._process
    ssh.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        machine.link(KATA).call("disks", "list")
        assert time.monotonic() - began > 2, "it waited until the other had ended"
    finally:
        ssh.send_signal(signal.SIGCONT)


def test_two_askers_do_not_wait_for_each_other(machine: FarMachine) -> None:
    first, second = machine.link(KATA), machine.link(KATA)
    for link in (first, second, first):
        assert link.call("disks", "list") == ()


def test_a_file_that_does_not_fit_is_an_error_and_goes(machine: FarMachine, tmp_path: Path) -> None:
    full = (
        "import hypervisors.far.agent as a, errno\n"
        "def add(self, path, data): self._failed[path] = OSError(errno.ENOSPC, 'No space left')\n"
        "a.IncomingFiles.add = add"
    )
    disks = machine.disks(KATA, spoil=full)
    sent = image(tmp_path)
    with pytest.raises(NoSpace, match=r"127\.0\.0\.1: .*No space left") as failed:
        disks.seal(sent, template())
    assert str(failed.value.remedy).startswith("on 127.0.0.1: make room on")
    assert sent.exists(), "it is not lost"
    assert not list(machine.state.rglob("incoming/*"))


def test_a_machine_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"xen+ssh://127.0.0.1:{nobody.getsockname()[1]}/system"
        there = far(uri)
        place = Place(disks=StorePlace(farm=KATA), driver="xen", uri=there.uri)
        with pytest.raises(DriverFailed, match="Connection refused"):
            Link(there.name, there.argv, place, Callbacks()).call("disks", "list")


@pytest.mark.parametrize(
    ("spoil", "text", "remedy"),
    [
        ("sys.exit('farmhand needs Python 3.11 there, it is 3.9')", "needs Python 3.11 there", "Debian"),
        ("import nothing", "No module named", "python3 -c"),
    ],
)
def test_a_machine_that_can_not_run_it_says_why(
    machine: FarMachine, spoil: str, text: str, remedy: str
) -> None:
    with pytest.raises(DriverFailed, match=r"no farmhand agent on 127\.0\.0\.1") as failed:
        machine.link(KATA, spoil=spoil).call("disks", "list")
    assert text in str(failed.value)
    assert remedy in failed.value.remedy


def test_an_error_of_the_system_is_told_with_its_machine(machine: FarMachine) -> None:
    def failing(*more: str) -> FarmhandError:
        broken = (
            "import hypervisors.disks.qcow2.disks as q\n"
            f"def list(self): raise OSError(5, 'Input/output error', *{more!r})\n"
            "q.Qcow2Disks.list = list"
        )
        with pytest.raises(FarmhandError) as failed:
            machine.disks(KATA, spoil=broken).list()
        assert not failed.value.detail, "no traceback"
        return failed.value

    at = failing("/dev/vg/lv")
    assert str(at) == "127.0.0.1: cannot use /dev/vg/lv: Input/output error"
    assert str(at.remedy).startswith("on 127.0.0.1: see dmesg")
    assert str(failing()) == "127.0.0.1: Input/output error"


def test_a_defect_of_ours_is_told_whole(machine: FarMachine) -> None:
    broken = "import hypervisors.disks.qcow2.disks as q\nq.Qcow2Disks.list = lambda self: {}[1]"
    with pytest.raises(DriverFailed, match=r"^127\.0\.0\.1: a defect in farmhand") as failed:
        machine.disks(KATA, spoil=broken).list()
    assert "Traceback" in failed.value.detail


@pytest.mark.parametrize(
    ("variable", "what"), [("STATE", "inodes"), ("STATE", "room"), ("RUNTIME", "inodes")]
)
def test_a_full_disk_there(machine: FarMachine, tmp_path: Path, variable: str, what: str) -> None:
    """A real one, of 64 KiB, in a mount namespace of the agent's own."""
    program = machine.place / "bin" / "python3"
    program.parent.mkdir(exist_ok=True)
    rights = "" if os.geteuid() == 0 else "--user --map-root-user"
    where = f"{machine.place}/full/{variable.lower()}"
    program.write_text(
        f"""#!/bin/sh
mkdir -p {where}; export FARMHAND_{variable}_DIR={where}
exec unshare --mount {rights} sh -c '
mount -t tmpfs -o size=64k,nr_inodes={12 if what == "inodes" else 99},mode=700 none "$0"
cat /dev/zero >"$0/x" 2>&-; n=0; while [ $n -lt 12 ] && mkdir "$0/$n" 2>&-; do n=$((n + 1)); done
exec "$@"' {where} {sys.executable} "$@"
"""
    )
    program.chmod(0o755)
    sent = image(tmp_path)
    with pytest.raises(NoSpace, match=rf"^127\.0\.0\.1: .*{where}.*No space left") as failed:
        machine.disks(KATA).seal(sent, template())
    assert str(failed.value.remedy).startswith(f"on 127.0.0.1: make room on the file system of {where}")
    assert not failed.value.detail and "\n" not in failed.value.message


def test_a_dead_libvirtd_there(machine: FarMachine) -> None:
    gone = machine.hypervisor(KATA, uri=machine.uri("/nowhere/libvirt-sock"))
    with pytest.raises(DriverFailed, match=r"^127\.0\.0\.1: .*no libvirtd there") as failed:
        gone.list()
    assert failed.value.remedy == "on 127.0.0.1: systemctl start libvirtd"


def test_what_a_task_here_puts_right_is_no_matter_of_that_machine() -> None:
    error = on("dom0", NotFound("kata-prod is gone", remedy=("make it: ", Call("clone-farm"))))
    assert (error.message, error.remedy) == (
        "dom0: kata-prod is gone",
        ("make it: ", Call("clone-farm")),
    )
    mine = on("dom0", Conflict("taken", vm="prod", remedy="give it another name"))
    assert (mine.message, mine.remedy) == ("prod: dom0: taken", "give it another name")
    failed = on("dom0", CommandFailed("no", argv=("zfs",), status=2, remedy="zpool import tank"))
    assert (failed.remedy, failed.argv, failed.status) == ("on dom0: zpool import tank", ("zfs",), 2)


@pytest.mark.parametrize(
    ("bashrc", "why"),
    [
        ("echo -- authorised use only --; printf 'no end of line'", ""),
        ("head -c 100000 /dev/urandom; echo at last >&2", ""),
        ("echo closed for today; exit 3", "closed for today"),
    ],
)
def test_a_login_that_prints(tmp_path: Path, bashrc: str, why: str) -> None:
    shell = which("bash")
    assert shell
    with FarMachine(tmp_path, shell=shell, dotfiles={".bashrc": bashrc}) as machine:
        if not why:
            assert machine.disks(KATA).list() == ()
            return
        with pytest.raises(DriverFailed, match=rf"no farmhand agent on 127\.0\.0\.1: {why}") as failed:
            machine.disks(KATA).list()
        assert f"ssh -p {machine.sshd.port} " in failed.value.remedy
        assert "this must work, asking nothing" in failed.value.remedy


def test_a_machine_without_what_is_needed_says_what_to_install_there(machine: FarMachine) -> None:
    program = machine.place / "bin" / "python3"
    program.parent.mkdir(exist_ok=True)
    for says in ("No module named 'libvirt'", "sh: 1: python3: not found"):
        program.write_text(f'#!/bin/sh\necho "{says}" >&2\nexit 127\n')
        program.chmod(0o755)
        with pytest.raises(DriverFailed, match=says) as failed:
            machine.link(KATA).call("disks", "list")
        assert failed.value.remedy.startswith("on 127.0.0.1, as root: apt-get install")
        assert "python3-libvirt" in failed.value.remedy


def test_a_python_there_without_libvirt_s_binding(machine: FarMachine) -> None:
    program = machine.place / "bin" / "python3"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    with pytest.raises(Unsupported, match=r"^127\.0\.0\.1: .* finds no module libvirt") as failed:
        machine.hypervisor(KATA).list()
    assert "on 127.0.0.1: as root: apt-get install" in str(failed.value.remedy)


def test_an_ssh_that_does_not_get_there(machine: FarMachine) -> None:
    def remedy(uri: str) -> str:
        with pytest.raises(DriverFailed, match=r"^no farmhand agent on 127\.0\.0\.1: ") as failed:
            machine.link(KATA, uri).call("disks", "list")
        return failed.value.remedy

    other = machine.place / "other"
    make_key(other)
    wrong_key = machine.uri().replace(f"{machine.place}/key".replace("/", "%2F"), str(other))
    wrong_key = wrong_key.replace(str(machine.sshd.client_key), str(other))
    assert "a key that asks nothing" in remedy(wrong_key)
    machine.known.write_text(
        f"[127.0.0.1]:{machine.sshd.port} {other.with_name('other.pub').read_text()}"
    )
    assert "compare the host key" in remedy(machine.uri())
    machine.sshd.stop()
    assert f"ssh -p {machine.sshd.port} " in remedy(machine.uri())


def test_what_is_sent_is_packed() -> None:
    with zipfile.ZipFile(io.BytesIO(parcel())) as file:
        assert len(parcel()) < sum(one.file_size for one in file.infolist()) / 2


def test_nothing_of_ours_stays_on_its_disk(machine: FarMachine) -> None:
    machine.link(KATA).call("disks", "list")
    assert not machine.state.exists()


def test_askers_that_begin_together_do_not_wait_for_each_other(machine: FarMachine) -> None:
    links = [machine.link(KATA) for _ in range(6)]
    answers: list[object] = []
    threads = [
        threading.Thread(target=lambda link=link: answers.append(link.call("disks", "list")))
        for link in links
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [()] * len(links)


def test_ctrl_c_waits_until_the_change_has_ended(machine: FarMachine, tmp_path: Path) -> None:
    """A program that is interrupted while the other side works: nothing goes on behind its back."""
    slow = (
        "import time, hypervisors.disks.qcow2.disks as q\nreal = q.Qcow2Disks.clone\n"
        "def clone(self, *a):\n time.sleep(3)\n return real(self, *a)\nq.Qcow2Disks.clone = clone"
    )
    disks = machine.disks(KATA, spoil=slow)
    sealed = disks.seal(image(tmp_path), template())
    disks.list()
    timer = threading.Timer(1, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        disks.clone(sealed, "kata-prod", OWNER, SIZE)
    assert disks.find("kata-prod") is None, "it was stopped at its first step"


def test_its_kvm_is_trusted_there(machine: FarMachine, tmp_path: Path) -> None:
    """Notes are that machine's own; its agent looks at them anew once it is distrusted."""
    here = KvmTrust(tmp_path / "here")
    first, second = machine.hypervisor(KATA), machine.hypervisor(KATA)
    assert not first.kvm_trust().proven()
    first.kvm_trust().prove()
    assert second.kvm_trust().proven() and not here.proven()
    first.kvm_trust().distrust("no sign of life")
    assert not first.capabilities().accelerated
    able = first.capabilities()
    assert able.why_accelerated == able.notes[0] != "", "and not where it is, which is a note, too"
    if Path("/dev/kvm").exists():
        assert "no sign of life" in able.why_accelerated
