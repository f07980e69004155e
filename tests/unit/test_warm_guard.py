"""Who lets paused machines run on where nobody else can, on libvirt's own test driver: its daemon is a
file, and is away while that is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.libvirt.warm import guard
from hypervisors.libvirt.warm.guard import guarded
from hypervisors.libvirt.warm.images import HELD
from inventory.errors import DriverFailed

HOST = """\
<node><domain type='test'>
  <name>prod</name><memory>65536</memory><os><type>hvm</type></os>
</domain></node>
"""
BEFORE = 5.0  # seconds after which it gave up where its command lived


class Heard(Runner):
    """Knows what it has started."""

    def talk(self, *argv: str | Path) -> subprocess.Popen[bytes]:
        self.process = super().talk(*argv)
        return self.process


@pytest.fixture
def daemon(tmp_path: Path) -> Path:
    file = tmp_path / "host.xml"
    file.write_text(HOST)
    return file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / HELD).touch()
    return tmp_path / "place"


@pytest.fixture
def heard() -> Iterator[Heard]:
    runner = Heard()
    yield runner
    runner.process.kill()
    runner.process.wait()


def fails(runner: Runner, daemon: Path, place: Path) -> None:
    """A command that meets an error while the daemon is away, and can't let its machine run on."""
    with pytest.raises(DriverFailed), guarded(runner, f"test://{daemon}", {"prod": place}):
        daemon.rename(daemon.with_suffix(".away"))
        raise DriverFailed("it is away")


def test_it_goes_on_where_the_daemon_is_away_for_longer_than_its_command_waits(
    heard: Heard, daemon: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever began it may end meanwhile, as by a second Ctrl-C."""
    monkeypatch.setattr(guard, "_PATIENCE", 0.1)
    began = time.monotonic()
    fails(heard, daemon, place)
    time.sleep(max(0.0, BEFORE + 1 - (time.monotonic() - began)))
    assert heard.process.poll() is None
    daemon.with_suffix(".away").rename(daemon)
    assert heard.process.wait(30) == 0


def test_it_has_nothing_to_do_where_all_run(heard: Heard, daemon: Path, place: Path) -> None:
    with guarded(heard, f"test://{daemon}", {"prod": place}) as all_run:
        all_run()
    assert heard.process.returncode == 0


def test_who_recovers_a_machine_ends_it_by_that(
    heard: Heard, daemon: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_PATIENCE", 0.1)
    daemon.write_text(HOST.replace("prod", "another"))  # else it would be done at once
    with pytest.raises(DriverFailed), guarded(heard, f"test://{daemon}", {"prod": place}):
        raise DriverFailed("it can't be done")
    assert heard.process.poll() is None
    (place / HELD).unlink()
    assert heard.process.wait(30) == 0
