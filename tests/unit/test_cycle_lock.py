"""A cycle under the lock that it shares with others: two controllers, real machines, a real server."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, lab, plan_cycle, reset, run, run_cycle
from dav_servers import PASSWORD, USER, DavServer, credentials, dav_server
from repo_tree import make_deb
from sshd_machine import wait_for

from builds.dav import Dav
from builds.dav_login import Credentials
from builds.record import find_record
from builds.unlock import Unlock
from builds.webdav_lock import break_lock, look
from inventory.errors import BuildFailed, Busy, InventoryError, NotFound, WrongState, spelled
from inventory.loader import load
from provision import package_repositories
from provision.engine.runner import perform
from provision.site import Site
from tests import farm

__all__ = ["lab"]
ROOT = Path(__file__).parents[2]
KNOWN = Credentials(USER, PASSWORD)


@pytest.fixture(scope="module")
def server() -> Iterator[DavServer]:
    with dav_server("apache", "digest") as found:
        yield found


@pytest.fixture
def place(server: DavServer, lab: Lab) -> str:
    """A lock of the test's own."""
    return f"{server.url}-{lab.root.name}"


def there(place: str) -> Dav:
    return Dav(place, KNOWN, None)


def sharing(lab: Lab, place: str, steps: list[dict], *, timeout: str = "60s") -> Path:
    credentials(lab.root)
    path = lab.farm_file(steps)
    text = json.loads(path.read_text())
    text["cycle"]["lock"] = {"webdav": place, "credentials": "dav-login", "timeout": timeout}
    path.write_text(json.dumps(text))
    return path


def opened(lab: Lab, place: str, steps: list[dict], **more: str) -> Site:
    return Site(load(sharing(lab, place, steps, **more)), reporter=lab.told)


SLOW = "touch begun; while [ ! -e go-on ]; do sleep 0.05; done"
_CHILD = (
    "import sys; from pathlib import Path; import cli.composition\n"
    "from builds.operation import RunCycle\n"
    "from inventory.loader import load\n"
    "from provision.engine.report import QuietReporter\n"
    "from provision.engine.runner import perform\n"
    "from provision.site import Site\n"
    "with Site(load(Path(sys.argv[1])), reporter=QuietReporter()) as site:\n"
    "    perform(site, RunCycle())\n"
)


def another_pc(lab: Lab, file: Path, pc: str) -> subprocess.Popen[bytes]:
    """A cycle of a controller with a state of its own."""
    (lab.root / pc).mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, file], cwd=ROOT, stderr=subprocess.PIPE,
        env=environment(lab.root / pc),
    )  # fmt: skip


def test_held_while_it_runs_and_given_back(lab: Lab, place: str, server: DavServer) -> None:
    steps = [reset("dev2"), run("slow", SLOW)]
    child = another_pc(lab, sharing(lab, place, steps), "pc1")
    wait_for((lab.dev2.home / "begun").exists)
    seen = look(there(place))
    assert seen.held
    assert seen.holder is not None
    assert (seen.holder.farm, seen.holder.pid) == ("lab", child.pid)
    state = lab.root / "pc1" / "state" / "farms" / "lab"
    assert seen.holder.build == (state / "builds" / "last").readlink().name
    note = state / "cycle-lock.json"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    token = json.loads(note.read_text())["token"]
    assert token == seen.token

    steps[1] = run("quick", "touch quick")  # the other PC's, which has the same machines
    with opened(lab, place, steps) as site, pytest.raises(Busy) as refused:
        run_cycle(site)
    for word in ("the lock that others share", "farm lab", f"pid {child.pid}", seen.holder.build, "ago"):
        assert word in refused.value.message
    assert "unlock --remote --force" in spelled(refused.value.remedy)
    assert (lab.dev2.home / "begun").exists()  # nothing was reset
    with pytest.raises(NotFound):
        find_record(site.paths)
    assert site.journal.unfinished() == ()

    (lab.dev2.home / "go-on").touch()
    assert child.wait(60) == 0, child.communicate()[1]
    child.communicate()
    assert not note.exists()
    assert not look(there(place)).held
    assert there(place).ask("GET").status == 404
    with opened(lab, place, steps) as site:
        assert "hold " + place in "".join(spelled(action.text) for action in plan_cycle(site))
        run_cycle(site)
    written = [path for path in state.rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        data = path.read_bytes()
        assert token.encode() not in data, path
        assert PASSWORD.encode() not in data, path


def test_killed_then_recovered(lab: Lab, place: str) -> None:
    """The same controller gives back what it had, whatever time is left."""
    file = sharing(lab, place, [run("slow", SLOW)])
    child = another_pc(lab, file, ".")
    wait_for((lab.dev2.home / "begun").exists)
    child.kill()
    child.communicate()
    assert look(there(place)).held
    with Site(load(file), reporter=lab.told) as site:
        assert {"cycle", "cycle-lock"} == {record.verb for record in site.journal.unfinished()}
        farm.recover(site)
        assert site.journal.unfinished() == ()
    assert not look(there(place)).held
    assert there(place).ask("GET").status == 404
    assert list(lab.root.glob("state/farms/lab/cycle-lock*")) == []


def test_killed_and_recovered_without_its_note(lab: Lab, place: str) -> None:
    """As when it was killed between the lock and the note: the lock's owner tells."""
    file = sharing(lab, place, [run("slow", SLOW)])
    child = another_pc(lab, file, ".")
    wait_for((lab.dev2.home / "begun").exists)
    child.kill()
    child.communicate()
    (lab.root / "state/farms/lab/cycle-lock.json").unlink()
    with Site(load(file), reporter=lab.told) as site:
        farm.recover(site)
    assert not look(there(place)).held


def test_killed_and_taken_over_by_another(lab: Lab, place: str) -> None:
    """After its time; what the dead one's controller recovers later harms nobody."""
    file = sharing(lab, place, [run("slow", SLOW)], timeout="3s")
    child = another_pc(lab, file, "pc1")
    wait_for((lab.dev2.home / "begun").exists)
    child.kill()
    child.communicate()
    (lab.dev2.home / "begun").unlink()
    second = None

    def took_over() -> bool:
        nonlocal second
        second = another_pc(lab, file, "pc2")
        wait_for(lambda: second.poll() is not None or (lab.dev2.home / "begun").exists())
        if second.poll() is None:
            return True
        assert b"is held by" in second.communicate()[1]
        return False

    wait_for(took_over)
    assert second is not None
    code = _CHILD.replace("perform(site, RunCycle())", "__import__('tests.farm').farm.recover(site)")
    recovered = subprocess.run(
        [sys.executable, "-c", code, file], cwd=ROOT, env=environment(lab.root / "pc1"), check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert recovered.returncode == 0, recovered.stderr
    seen = look(there(place))
    assert seen.held
    assert seen.holder is not None
    assert seen.holder.pid == second.pid
    (lab.dev2.home / "go-on").touch()
    assert second.wait(60) == 0
    second.communicate()


def test_lost_while_it_builds(lab: Lab, place: str) -> None:
    """It is told at once; the build goes on to its end and publishes nothing."""
    package = lab.root / "hello_1.0_all.deb"
    package.write_bytes(make_deb("hello"))
    build = f"{SLOW}; cp {package} ."
    steps = [
        run("build", build, artifacts="*.deb"),
        {"name": "publish", "publish": "debs", "channel": "tested"},
        run("after", "touch after"),
    ]
    file = sharing(lab, place, steps, timeout="3s")
    text = json.loads(file.read_text())
    text["repositories"] = {"debs": {"format": "deb", "channels": ["tested"]}}
    file.write_text(json.dumps(text))

    def lose() -> None:
        wait_for((lab.dev2.home / "begun").exists)
        break_lock(there(place), look(there(place)))
        wait_for(lambda: any("lock lost" in line for line in lab.told.warned))
        (lab.dev2.home / "go-on").touch()

    other = threading.Thread(target=lose)
    other.start()
    with Site(load(file), reporter=lab.told) as site:
        repository = package_repositories.opened(site.farm, "debs")
        with pytest.raises(BuildFailed, match="is lost") as failed:
            run_cycle(site, keep_going=True)
        other.join()
        record = find_record(site.paths)
        assert [step.status for step in record.steps] == ["passed", "failed", "passed"]
        assert record.steps[1].failure == "infrastructure"
        assert "whoever holds it now" in spelled(failed.value.remedy)
        assert "lock lost" in " ".join(record.notes)
        assert "lock lost" in record.page.read_text()
        assert repository.head("tested") is None
        assert site.journal.unfinished() == ()

        run_cycle(site)  # under a lock taken anew
        assert repository.head("tested") is not None


def test_not_given_back_is_told_and_tried_again(lab: Lab) -> None:
    with dav_server("apache", "basic") as server:
        plain = run("one", "touch begun; while [ ! -e go-on ]; do sleep 0.05; done")
        file = sharing(lab, server.url, [plain])
        child = another_pc(lab, file, ".")
        wait_for((lab.dev2.home / "begun").exists)
        server.stop()
        (lab.dev2.home / "go-on").touch()
        assert child.wait(60) == 0, child.communicate()[1]
        child.communicate()
        server.start()
        assert look(there(server.url)).held
        with Site(load(file), reporter=lab.told) as site:
            assert find_record(site.paths).result == "passed"
            farm.recover(site)
        assert not look(there(server.url)).held


def test_unlock(lab: Lab, place: str) -> None:
    with opened(lab, place, [run("one", "true")]) as site:
        nobody = perform(site, Unlock())
        assert not nobody.result.held
        assert not nobody.changed
        foreign = there(place).ask(
            "LOCK",
            '<lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope><locktype><write/></locktype>'
            "<owner>Office of Satu</owner></lockinfo>",
            Depth="0", Timeout="Second-60", Content_Type="text/xml",
        )  # fmt: skip
        assert foreign.good
        shown = perform(site, Unlock())
        assert (shown.result.held, shown.result.owner) == (True, "Office of Satu")
        assert not shown.changed
        with pytest.raises(Busy, match="Office of Satu"):
            run_cycle(site)
        with Site(site.farm, reporter=lab.told, plan=True) as planning:
            assert perform(planning, Unlock(force=True)).changed
        assert look(there(place)).held
        assert "unlock" not in {one.verb for one in site.journal.history()}, "it was only looked at"
        done = perform(site, Unlock(force=True))
        ended = site.journal.history(1)[0]
        assert (ended.verb, ended.outcome, ended.requester.uid) == ("unlock", "done", os.getuid())
        assert "Office of Satu" in ended.steps[0][1]
        assert done.result.broken
        assert not look(there(place)).held
        run_cycle(site)
    with lab.site([run("one", "true")]) as site, pytest.raises(NotFound, match="shares no lock"):
        perform(site, Unlock())


def test_files_that_are_not_right(lab: Lab, place: str) -> None:
    file = sharing(lab, place, [reset("dev2")])
    (lab.root / "dav-login").chmod(0o644)
    marker = lab.dev2.home / "as-it-was"
    marker.touch()
    with Site(load(file), reporter=lab.told) as site, pytest.raises(WrongState, match="others may read"):
        run_cycle(site)
    assert marker.exists()


@pytest.mark.parametrize(
    ("lock", "wrong"),
    [
        ({"webdav": "https://dav.example"}, "a file's URL"),
        ({"webdav": "https://dav.example/locks/"}, "a file's URL"),
        ({"webdav": "https://dav.example/lock?key=1"}, "a file's URL"),
        ({"webdav": "http://dav.example/lock"}, "without TLS"),
        ({"webdav": "https://aleksi:pw@dav.example/lock"}, "without a login"),
        ({"webdav": "http://127.0.0.1/lock", "ca": "ca.pem"}, "https"),
        ({"webdav": "https://dav.example/lock", "timeout": "1s"}, "3s to 1d"),
        ({"webdav": "https://dav.example/lock", "timeout": "2d"}, "3s to 1d"),
        ({"credentials": "x"}, "webdav"),
        ({"webdav": "https://dav.example/lock", "password": "x"}, "password"),
    ],
)
def test_sections_that_are_refused(lab: Lab, lock: dict, wrong: str) -> None:
    path = lab.farm_file([run("one", "true")])
    text = json.loads(path.read_text())
    text["cycle"]["lock"] = lock
    path.write_text(json.dumps(text, indent=1))
    with pytest.raises(InventoryError) as refused:
        load(path)
    assert re.search(rf"farm\.yaml:\d+:\d+: .*{wrong}", refused.value.message)
