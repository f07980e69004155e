"""unbound: names and addresses as local data, checked, changed live, put back, verified."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from networks import wait_for
from test_verify import verify
from yard import Yard

from inventory.errors import CommandFailed, DriverFailed, NotOurs

MAIN = """\
server:
    interface: 127.0.0.1@5302
    username: ""
    chroot: ""
    directory: "{d}"
    pidfile: "{d}/pid"
    use-syslog: no
    num-threads: 1
    local-zone: "try.example." static
    local-data: "by-hand.try.example. 60 IN A 10.77.0.99"
remote-control:
    control-enable: yes
    control-interface: {d}/control
    control-use-cert: no
include-toplevel: "{d}/conf.d/*.conf"
"""


@pytest.fixture
def unbound(yard: Yard, daemons: object) -> Iterator[Yard]:
    """The daemon, serving; the yard has no other service."""
    d = yard.directory / "unbound"
    (d / "conf.d").mkdir(parents=True)
    (d / "main.conf").write_text(MAIN.format(d=d))
    control = ["unbound-control", "-c", f"{d}/main.conf"]
    yard.services["unbound"] = {
        "config": f"{d}/conf.d/farm.conf", "main": f"{d}/main.conf", "port": "5302", "control": control,
    }  # fmt: skip
    yard.use("unbound")
    argv = ["unbound", "-d", "-c", f"{d}/main.conf"]
    with (yard.directory / "logs" / "unbound").open("ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        status = [*control, "status"]
        wait_for(lambda: subprocess.run(status, capture_output=True, check=False).returncode == 0)
        yield yard
    finally:
        process.terminate()
        process.wait(60)


def ask(name: str, kind: str) -> list[str]:
    argv = ["dig", "+short", "+tries=2", "+time=2", "-p", "5302", "@127.0.0.1", name, kind]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def told(yard: Yard) -> list[str]:
    return [action.text for action in yard.apply().actions if action.verb == "tell"]


def config(yard: Yard) -> Path:
    return Path(yard.services["unbound"]["config"])


def test_its_life(unbound: Yard) -> None:
    yard = unbound
    assert any("reload" in text for text in told(yard))  # the file is new
    assert ask("git.try.example", "A") == ["10.77.0.6"]
    assert ask("dev2.try.example", "AAAA") == ["fd77::6"]
    assert ask("6.0.77.10.in-addr.arpa", "PTR") == ["dev2.try.example."]
    report = verify(yard)
    assert report.ok, report.wrong
    assert len(report.answers) == 2 * 3 + 2 * 2  # two addresses of three names, and back from four
    assert not yard.apply().changed
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.vms["dev2"]["address"] = "10.77.0.66"
    assert told(yard) == ["unbound: change the local data of 9 names"]
    assert ask("more.try.example", "A") == ["10.77.0.9"]
    assert ask("dev2.try.example", "A") == ["10.77.0.66"]
    assert ask("6.0.77.10.in-addr.arpa", "PTR") == []
    assert ask("66.0.77.10.in-addr.arpa", "PTR") == ["dev2.try.example."]
    del yard.vms["more"]
    assert told(yard) == ["unbound: change the local data of 3 names"]
    assert ask("more.try.example", "A") == ask("9.0.77.10.in-addr.arpa", "PTR") == []
    assert ask("prod.try.example", "A") == ["10.77.0.7"]
    assert verify(yard).ok


def test_what_is_there_by_hand_stays(unbound: Yard) -> None:
    """A name loses all its data at once over the control channel: the admin's too."""
    yard = unbound
    yard.vms["prod"]["aliases"] = ["by-hand"]
    yard.apply()
    assert sorted(ask("by-hand.try.example", "A")) == ["10.77.0.7", "10.77.0.99"]
    yard.vms["prod"]["aliases"] = []
    yard.apply()
    assert ask("by-hand.try.example", "A") == ["10.77.0.99"]


def test_wrong_answers_are_seen(unbound: Yard) -> None:
    yard = unbound
    yard.apply()
    control = yard.services["unbound"]["control"]
    subprocess.run([*control, "local_data_remove", "prod.try.example"], check=True)
    wrong = {(answer.vm, answer.text.split(",")[0]) for answer in verify(yard).wrong if answer.vm}
    assert wrong == {("prod", "prod.try.example A"), ("prod", "prod.try.example AAAA")}
    yard.vms["prod"]["address"] = "10.77.0.8"  # the server isn't what our file said: all is read again
    yard.apply()
    assert verify(yard).ok


def test_a_refusal_puts_all_back(unbound: Yard, tmp_path: Path) -> None:
    yard = unbound
    yard.apply()
    before = config(yard).read_bytes()
    yard.services["templates"] = str(tmp_path)
    own = tmp_path / "unbound.j2"
    own.write_text('{% include "farmhand/unbound.j2" %}\nrubbish (\n')
    with pytest.raises(CommandFailed, match="unbound: unbound-checkconf refuses"):
        yard.apply()
    own.write_text('{% include "farmhand/unbound.j2" %}\tlocal-data: "x.try.example. IN A 10.77.0.1"\n')
    control = yard.services["unbound"]["control"]
    script = yard.directory / "control"  # that is refused in the midst of it
    script.write_text(
        f'#!/bin/sh\ncase $1 in local_datas|reload) exit 1;; esac\nexec {" ".join(control)} "$@"\n'
    )
    script.chmod(0o755)
    yard.services["unbound"]["control"] = [str(script)]
    with pytest.raises(CommandFailed):
        yard.apply()
    assert config(yard).read_bytes() == before
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]


def test_one_that_does_not_read_our_file(unbound: Yard) -> None:
    """Its configuration includes the file, and it was started with another."""
    yard = unbound
    checked = yard.directory / "unbound" / "checked.conf"
    elsewhere = yard.directory / "unbound" / "elsewhere.conf"
    checked.write_text(Path(yard.services["unbound"]["main"]).read_text() + f'include: "{elsewhere}"\n')
    yard.services["unbound"] |= {"config": str(elsewhere), "main": str(checked)}
    with pytest.raises(DriverFailed, match="does not serve all") as caught:
        yard.apply()
    assert "every file and daemon is as it was before" in str(caught.value.remedy)
    assert not config(yard).exists()


def test_anothers_file_is_not_touched(unbound: Yard) -> None:
    config(unbound).write_text("server:\n")
    with pytest.raises(NotOurs):
        unbound.apply()
