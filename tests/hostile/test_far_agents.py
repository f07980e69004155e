"""What another machine's agent can do to us by what it sends, by sending nothing, and by staying."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.processes import command_line
from hypervisors.api import Callbacks
from hypervisors.disks.stores import StorePlace
from hypervisors.far import line
from hypervisors.far.agent import GREETING
from hypervisors.far.frames import CHUNK, Pipe
from hypervisors.far.link import Link
from hypervisors.libvirt.opening import Place
from inventory.errors import Busy, ConnectionLost, DriverFailed, FarmhandError, Interrupted
from tests.contract.far_rig import FarMachine
from tests.identities import KATA
from tests.unit.sshd_machine import alive, children, gone, wait_for

ROOT = Path(__file__).resolve().parents[2]
PLACE = Place(disks=StorePlace(farm=KATA), driver="kvm", uri="qemu:///system")
AGENT = f"""
import os, sys, time
def say(data):
    if isinstance(data, str):
        data = data.encode()
    while data:
        data = data[os.write(1, data):]
def ping_for_ever():
    while True:
        say('{{"ping": 1}}\\n')
        time.sleep(0.2)
say({GREETING!r})
"""
ASKED = f"""{AGENT}
sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
while b'"call"' not in sys.stdin.buffer.readline():
    pass
"""
"""They begin as ours do; the second one was asked, by its first call, which has the number 1."""


def link_to(program: str, callbacks: Callbacks | None = None) -> Link:
    argv = (sys.executable, "-I", "-c", program)
    return Link("dom0", lambda _: argv, PLACE, callbacks or Callbacks())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "QUIET", 1.5)
    monkeypatch.setattr(line, "OPENING", 4.0)


BAD = {
    "no kind": """say('{"hello": 1}\\n')""",
    "no object": """say('[1]\\n')""",
    "no JSON": """say('{"done": 1, "value": \\n')""",
    "not even text": r"""say(b'\xff\xfe\x00{}\n')""",
    "bytes without end": """say('{"done": 1, "value": null, "bytes": 10000000000000}\\n')""",
    "negative bytes": """say('{"done": 1, "value": null, "bytes": -1}\\n')""",
    "half a byte": """say('{"done": 1, "value": null, "bytes": 0.5}\\n')""",
    "deep": """say('{"done": 1, "value": ' + '[' * 100000 + ']' * 100000 + '}\\n')""",
    "deeper than json goes": """say('[' * 5000000 + '\\n')""",
    "less deep": """say('{"done": 1, "value": ' + '[' * 60 + ']' * 60 + '}\\n')""",
    "many": """say('{"done": 1, "value": [' + '[],' * 5000000 + '1]}\\n')""",
    "a long number": """say('{"done": ' + '1' * 100000 + '}\\n')""",
    "no number": """say('{"done": "1", "value": null}\\n')""",
    "true is no number": """say('{"done": true, "value": null}\\n')""",
    "no value": """say('{"done": 1}\\n')""",
    "a value of no kind": """say('{"done": 1, "value": {"Popen": {}}}\\n')""",
    "two kinds at once": """say('{"done": 1, "value": {"Path": "/", "Owner": {}}}\\n')""",
    "a value with other fields": """say('{"done": 1, "value": {"Owner": {"x": 1}}}\\n')""",
    "no error": """say('{"failed": 1, "error": "no"}\\n')""",
    "an exit for an error": """say('{"failed": 1, "error": {"!SystemExit": {}}}\\n')""",
    "no refusal": """say('{"refused": 7}\\n')""",
    "a step without words": """say('{"step": 1}\\n')""",
    "steps that wait for nobody": """while True: say('{"step": 1, "text": "go"}\\n')""",
    "an answer to nobody": """say('{"done": 77, "value": null}\\n')""",
    "warnings without end": """while True: say('{"warn": "look"}\\n')""",
    "no warning": """say('{"warn": {"x": {}}}\\n')""",
    "no progress": """say('{"working": 7}\\n')""",
    "a line without end": """while True: say('x' * 65536)""",
    "nothing": """time.sleep(600)""",
    "half a frame": """say('{"done": 1, "va'); time.sleep(600)""",
    "a trickle": """while True: say(' '); time.sleep(0.2)""",
    "its end": """sys.exit(0)""",
    "its death": """os.kill(os.getpid(), 9)""",
    "no input taken": """os.close(0); time.sleep(600)""",
}


@pytest.mark.parametrize("what", BAD)
def test_whatever_an_agent_sends_is_a_lost_connection(
    what: str, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    link = link_to(f"{ASKED}\n{BAD[what]}\ntime.sleep(600)")
    with pytest.raises(ConnectionLost) as lost:
        link.call("disks", "find", "prod")
    assert lost.value.message.startswith("the connection to dom0 was lost (find prod)")
    assert "\n" not in lost.value.message and len(lost.value.message) < 300
    assert not link._line or gone(link._line._process.pid), "what it sends is not waited for any more"
    link.close()
    assert "Traceback" not in capsys.readouterr().err


def test_one_that_takes_nothing_of_what_it_is_made_of(impatient: None) -> None:
    link = link_to(f"{AGENT}\nping_for_ever()")
    with pytest.raises(ConnectionLost, match=r"its agent took nothing for 1\.5 s"):
        link.call("disks", "list")
    link.close()


@pytest.mark.parametrize(
    "before", ["time.sleep(600)", "os.write(1, b'y')\n time.sleep(0.1)", "os.write(1, b'y\\n' * 9999)"]
)
def test_one_that_never_greets(before: str, impatient: None) -> None:
    link = link_to(f"import os, time\nwhile True:\n {before}")
    with pytest.raises(DriverFailed, match=r"^dom0: it (did not answer|sent what no)") as failed:
        link.call("disks", "list")
    assert failed.value.remedy == "try: ssh dom0 true"
    link.close()


def test_a_file_for_one_that_takes_nothing(impatient: None, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(2**22))
    answer = """say('{"done": 1, "value": {"Path": "/there"}}\\n')\nping_for_ever()"""
    link = link_to(f"{ASKED}\n{answer}")
    with pytest.raises(ConnectionLost, match="its agent took nothing for 1"):
        link.send(tmp_path / "image", "image")
    link.close()


# -- frames -------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
_KEYS = st.sampled_from(
    ["ping", "warn", "working", "refused", "step", "done", "failed", "value", "error", "text",
     "bytes", "Path", "Disk", "Owner", "!NotFound", "Call", ""]
)  # fmt: skip
_FRAMES = st.lists(
    st.dictionaries(_KEYS, st.just(1) | _JSON | st.dictionaries(_KEYS, _JSON, max_size=2), max_size=4)
    .map(json.dumps)
    .map(str.encode)
    | st.binary(max_size=64),
    max_size=6,
).map(b"\n".join)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(_FRAMES)
def test_any_frames_end_as_an_answer_or_as_a_failure(tmp_path: Path, frames: bytes) -> None:
    (tmp_path / "frames").write_bytes(GREETING + frames)
    link = Link("dom0", lambda _: ("cat", str(tmp_path / "frames")), PLACE, Callbacks())
    try:
        link.call("disks", "find", "prod")
    except FarmhandError as error:
        assert "dom0" in error.message
    link.close()


@settings(max_examples=150, deadline=None)
@given(_FRAMES, st.booleans())
def test_any_bytes_are_frames_an_end_or_refused(data: bytes, files: bool) -> None:
    pipe = Pipe(io.BytesIO(data + b"\n"), -1, files=files, waiting=lambda _: None)
    for _ in itertools.count():
        try:
            received = pipe.receive()
        except ValueError:
            continue
        if received is None:
            break
        assert isinstance(received[0], dict) and len(received[1]) <= (CHUNK if files else 0)


class Endless(io.RawIOBase):
    """It has always more of it."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = len(buffer) // len(self._text) * len(self._text)
        buffer[:size] = self._text * (size // len(self._text))
        return size


@pytest.mark.parametrize("text", [b"x", b"[", b"[],", b'{"a":', b"1,", b'"ab",'], ids=bytes.decode)
def test_memory_for_a_frame_is_bounded(text: bytes) -> None:
    pipe = Pipe(io.BufferedReader(Endless(text)), -1, files=False, waiting=lambda _: None)
    tracemalloc.start()
    with pytest.raises(ValueError, match="a frame"):
        pipe.receive()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


# -- signals ------------------------------------------------------------------------------------------

FARM = """
farm: kata
hosts: {{far: {{driver: kvm, uri: "qemu+ssh://root@dom0/system"}}}}
network: {{mode: bridge, bridge: br0, subnet: 10.0.0.0/24}}
templates: {{base: {{build: debian-12}}}}
vms: {{prod: {{}}, dev: {{}}}}
"""


@pytest.fixture
def deaf(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A command, of a farm whose host's agent lives and never answers."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f"#!{sys.executable} -I\n{ASKED}\nopen({str(tmp_path / 'asked')!r}, 'w')\nping_for_ever()\n"
    )
    ssh.chmod(0o755)
    (tmp_path / "farm.yaml").write_text(FARM.format())
    place = {f"FARMHAND_{name}_DIR": str(tmp_path / name.lower()) for name in ("STATE", "RUNTIME")}
    process = subprocess.Popen(
        [sys.executable, "-P", "cli/start.py", *request.param, "--farm", str(tmp_path / "farm.yaml")],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **place, "PATH": f"{ssh.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def _agent_of(process: subprocess.Popen[str]) -> list[int]:
    found = []
    for pid in children(process.pid):
        with contextlib.suppress(OSError):  # it was there for a moment
            if any("ssh" in word for word in command_line(pid)):
                found.append(pid)
    return found


@pytest.mark.parametrize(
    ("deaf", "number"),
    [(("status",), signal.SIGINT), (("stop", "--all"), signal.SIGTERM)],
    indirect=["deaf"],
)
def test_a_signal_ends_a_command_whose_agent_does_not_answer(
    deaf: subprocess.Popen[str], number: signal.Signals, tmp_path: Path
) -> None:
    wait_for((tmp_path / "asked").exists)
    [agent] = _agent_of(deaf)
    deaf.send_signal(number)
    _, said = deaf.communicate(timeout=60)
    assert deaf.returncode == 128 + number
    how = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert f"farmhand: {how}" in said and "Traceback" not in said
    assert gone(agent)


def test_a_thread_that_waits_ends_when_the_command_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(line, "_WAITING", 1.0)
    monkeypatch.setattr(line, "_ABANDONED", 1.0)
    interrupted = threading.Event()
    said: list[str] = []
    callbacks = Callbacks(interrupted=interrupted.is_set, working=said.append)
    link = link_to(f"{ASKED}\nping_for_ever()", callbacks)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            link.call("machines", "stop", "kata-prod")
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: said, 60)
    assert said[0].startswith("waiting for dom0 since ") and said[0].endswith(": stop kata-prod")
    interrupted.set()
    thread.join(60)
    assert [type(error) for error in ended] == [Interrupted]
    link.close()


# -- agents that stay ---------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FarMachine]:
    with FarMachine(tmp_path) as made:
        yield made


def _pid(machine: FarMachine) -> int:
    [presence] = (machine.place / "run").rglob("far-*")
    return int(presence.name.removeprefix("far-"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_agent_is_a_lost_connection(machine: FarMachine, number: signal.Signals) -> None:
    link = machine.link(KATA)
    link.call("disks", "list")
    os.kill(_pid(machine), number)
    wait_for(lambda: link._line is None or link._line.lost)
    assert link.call("disks", "list") == (), "another one is made"


def test_a_stopped_agent_is_lost_named_and_ends_when_it_can(
    machine: FarMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "QUIET", 1.5)
    quick = "import hypervisors.far.agent as a; a.SILENCE = 2.0; a._PATIENCE = 0.5"
    link = machine.link(KATA, spoil=quick)
    link.call("disks", "list")
    pid = _pid(machine)
    [presence] = (machine.place / "run").rglob("far-*")
    assert presence.stat().st_mtime_ns <= time.monotonic_ns(), "of a clock that nobody sets"
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionLost, match=r"nothing was heard from its agent for 1\.5 s"):
            link.call("disks", "list")
        looking = machine.link(KATA, plan=True)
        assert looking.call("disks", "list") == (), "who only looks waits for nobody"
        said: list[str] = []
        later = machine.link(KATA, spoil=quick)
        later._callbacks = Callbacks(working=said.append)
        with pytest.raises(Busy) as busy:
            later.call("disks", "list")
        assert busy.value.message.startswith(f"127.0.0.1: process {pid} there, the agent of ")
        assert f", process {os.getpid()}, has heard nothing for " in busy.value.message
        assert f"kill -9 {pid}" in str(busy.value.remedy)
        assert str(busy.value.remedy).startswith("on 127.0.0.1: ")
        assert any(f"127.0.0.1: waiting for process {pid} there" in text for text in said)
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert gone(pid), "the kernel's timer ends it, whatever it is doing"
    assert machine.link(KATA).call("disks", "list") == ()
