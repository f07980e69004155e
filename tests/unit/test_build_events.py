"""Events of builds: told while the build runs, with what came of it; a build that was killed is told
of by the next command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, lab, run, run_cycle
from sshd_machine import wait_for

from builds.record import find_record
from inventory.errors import BuildFailed
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site
from tests import farm
from tests.unit.receiver import SECRET, Receiver, receiving

__all__ = ["lab"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def declare(lab: Lab, receiver: Receiver, steps: list[dict]) -> Path:
    secret = lab.root / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    path = lab.farm_file(steps)
    told = {"chat": {"webhook": receiver.url, "secret_file": "secret", "on": "build"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "events": told}))
    return path


def types(receiver: Receiver) -> list[str]:
    return [event["type"] for event in receiver.got]


def test_passed_failed_and_killed(lab: Lab, receiver: Receiver) -> None:
    with Site(load(declare(lab, receiver, [run("one", "true")])), reporter=QuietReporter()) as site:
        record = run_cycle(site)
    assert types(receiver) == ["build.began", "build.passed"]
    passed = receiver.got[-1]["data"]
    assert passed["build"]["id"] == record.id == receiver.got[0]["data"]["build"]["id"]
    assert passed["build"]["result"] == "passed"
    assert passed["build"]["commit"] == record.source.commit
    assert passed["build"]["failed"] is None
    assert passed["requester"]["uid"] == record.requester.uid

    file = declare(lab, receiver, [run("one", "echo 'make: *** [all] Error 2' >&2; exit 2")])
    with Site(load(file), reporter=QuietReporter()) as site, pytest.raises(BuildFailed):
        run_cycle(site)
    assert types(receiver)[2:] == ["build.began", "build.failed"]
    failed = receiver.got[-1]["data"]
    assert failed["operation"]["outcome"] == "failed"
    assert failed["build"]["failed"]["step"] == "one"
    assert failed["build"]["failed"]["class"]
    with Site(load(file), reporter=QuietReporter()) as site:
        assert site.journal.unfinished() == ()
        assert site.journal.history(1)[0].outcome == "failed"

    file = declare(lab, receiver, [run("slow", "sleep 300 & echo $! > pid; mv pid ready; wait")])
    code = (
        "import sys; from pathlib import Path; import cli.composition\n"
        "from builds.operation import RunCycle\n"
        "from inventory.loader import load\n"
        "from provision.engine.report import QuietReporter\n"
        "from provision.engine.runner import perform\n"
        "from provision.site import Site\n"
        "with Site(load(Path(sys.argv[1])), reporter=QuietReporter()) as site:\n"
        "    perform(site, RunCycle())\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, file], cwd=ROOT, env=environment(lab.root))
    wait_for((lab.dev2.home / "ready").exists)
    wait_for(lambda: len(receiver.got) == 5)  # while it runs
    child.kill()
    child.wait()
    with Site(load(file), reporter=QuietReporter()) as site:
        farm.recover(site)
        killed = find_record(site.paths).id
    assert types(receiver)[4:] == ["build.began", "build.recovered"]
    assert receiver.got[-1]["data"]["build"] == {"id": killed}


def test_one_that_hangs_holds_up_no_build(lab: Lab, receiver: Receiver) -> None:
    receiver.answer = lambda _event: None
    file = declare(lab, receiver, [run("one", "true")])
    with Site(load(file), reporter=QuietReporter()) as site:
        run_cycle(site)
        assert len(receiver.tries) == 1
        site.outbox.close(0.1)
    with Site(load(file), reporter=QuietReporter()) as site:
        assert "2 events not delivered yet" in site.journal.troubles()[0]
