"""Events: written with the journal's rows, delivered at least once and in their order, to receivers that
fail, hang, and are killed; nobody waits for them for long, and nothing fails by them."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from host.run import Runner
from inventory import kinds
from inventory.errors import InventoryError, WrongState
from inventory.loader import load
from provision.doctor import examine
from provision.engine import events
from provision.engine.events import Event, Subscriber, SubscriberSection
from provision.engine.facts import NoFacts
from provision.engine.journal import Entry
from provision.events import webhook
from provision.power import START, STOP, StopFacts
from provision.site import Site
from provision.status import status
from tests import farm
from tests.unit.receiver import SECRET, Receiver, receiving
from tests.unit.still_farm import StillFarm, place

if TYPE_CHECKING:
    from inventory.fields import Line

__all__ = ["place"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class FileSubscriber(SubscriberSection):
    """A kind of one's own: a file, and a line in the table."""

    file: Line
    """Events are appended to it."""

    def opened(self, beside: Path, _runner: Runner) -> Subscriber:
        return _Appending(beside / self.file)


class _Appending:
    def __init__(self, path: Path) -> None:
        self._path = path

    def deliver(self, event: Event) -> None:
        with self._path.open("ab") as file:
            file.write(event.body + b"\n")

    def check(self) -> None:
        """Whatever it is."""


def started(site: Site) -> AbstractContextManager[Entry[NoFacts]]:
    """An operation that does nothing."""
    return site.journal.begin(START, ["prod"], NoFacts())


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


class Told:
    """A farm of two VMs whose events go to subscribers."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.farm = StillFarm(place, "fake", ["dev2", "prod"])
        self._declared = self.farm.file.read_text()
        self.secret = place / "secret"
        self.secret.write_text(SECRET + "\n")
        self.secret.chmod(0o600)

    def subscribe(self, webhooks: dict[str, Any] | None = None, **commands: Any) -> None:
        section = {**(webhooks or {}), **commands}
        self.farm.file.write_text(f"{self._declared}events: {json.dumps(section)}\n")

    def hook(self, receiver: Receiver, **more: Any) -> dict[str, Any]:
        return {"webhook": receiver.url, "secret_file": "secret", **more}

    def site(self, *, plan: bool = False) -> Site:
        return self.farm.site(plan=plan)

    def clone(self) -> None:
        with self.site() as site:
            farm.clone_farm(site, ["prod"], start=False, wait=False)

    def rows(self, columns: str = "event") -> list[tuple[Any, ...]]:
        with self.site() as site:
            path = site.paths.journal
        db = sqlite3.connect(path)
        try:
            return db.execute(f"SELECT {columns} FROM outbox ORDER BY id").fetchall()
        finally:
            db.close()

    def due(self) -> None:
        """As if the wait were over."""
        with self.site() as site:
            path = site.paths.journal
        db = sqlite3.connect(path)
        with db:
            db.execute("UPDATE outbox SET due = 0")
        db.close()


@pytest.fixture
def told(place: Path) -> Told:
    return Told(place)


def test_what_a_webhook_gets(told: Told, receiver: Receiver) -> None:
    told.subscribe({"chat": told.hook(receiver)})
    with told.site(plan=True) as site:
        farm.clone_farm(site, ["prod"], start=False, wait=False)
    assert receiver.tries == [], "a plan tells nobody"
    told.clone()
    assert receiver.told() == [("operation.began", "clone"), ("operation.passed", "clone")]
    began, passed = receiver.got
    assert began["id"] != passed["id"]
    assert passed["data"]["farm"] == "still"
    operation = passed["data"]["operation"]
    assert (operation["vms"], operation["outcome"], operation["error"]) == (["prod"], "done", "")
    assert began["data"]["operation"]["ended"] is None
    assert operation["ended"]
    assert began["data"]["operation"]["id"] == operation["id"]
    assert passed["data"]["requester"]["uid"] == os.getuid()
    assert told.rows() == []
    with told.site() as site:
        assert SECRET not in "".join(map(str, site.journal.history()))


def test_a_failed_operation_is_told_with_its_error(told: Told, receiver: Receiver) -> None:
    told.subscribe({"chat": told.hook(receiver, on="operation.failed")})
    with told.site() as site:
        site.prepare()
        with pytest.raises(WrongState), started(site):
            raise WrongState("it is dirty")
    (failed,) = receiver.got
    assert failed["type"] == "operation.failed"
    assert failed["data"]["operation"]["error"] == "it is dirty"


def test_only_what_is_wanted(told: Told, receiver: Receiver) -> None:
    told.subscribe({
        "prods": told.hook(receiver, vms="prod", on=["operation.passed"]),
        "stops": told.hook(receiver, operations=["stop"], on=["operation"]),
    })  # fmt: skip
    with told.site() as site:
        site.prepare()
        for verb, vm in ((START, "dev2"), (START, "prod"), (STOP, "dev2")):
            facts = NoFacts() if verb is START else StopFacts(force=False)
            with site.journal.begin(verb, [vm], facts):
                pass
    assert sorted(receiver.told()) == [
        ("operation.began", "stop"), ("operation.passed", "start"), ("operation.passed", "stop"),
    ]  # fmt: skip


def test_one_that_fails_gets_it_later_with_the_same_id_and_in_order(
    told: Told, receiver: Receiver
) -> None:
    receiver.answer = lambda _event: 503
    told.subscribe({"chat": told.hook(receiver)})
    told.clone()
    assert len(receiver.tries) == 1, "the next try waits, and the command doesn't"
    [(tries, why), (untried, _)] = told.rows("tries, why")
    assert (tries, untried) == (1, 0)
    assert why == f"http://127.0.0.1:{receiver.server_port} answered 503 Service Unavailable"
    with told.site() as site:
        (warning,) = status(site).warnings
        assert warning == f"events for chat: 2 events not delivered yet: {why}"
        assert "sesame" not in warning, "the path may be as good as a password"
    receiver.answer = lambda _event: 204
    told.due()
    with told.site() as site:
        farm.stop(site, ["prod"])  # it is stopped: the command tells of nothing itself
    assert receiver.told()[:2] == [("operation.began", "clone"), ("operation.passed", "clone")]
    assert receiver.tries[0] == receiver.tries[1] == receiver.got[0]["id"]
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values()), "the same bytes at each try"
    with told.site() as site:
        assert status(site).warnings == ()


def test_a_retry_while_the_command_still_runs(
    told: Told, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_FIRST_WAIT", 0.01)
    answers = iter([500, 500, 204, 204])
    receiver.answer = lambda _event: next(answers)
    told.subscribe({"chat": told.hook(receiver)})
    with told.site() as site:
        site.prepare()
        with started(site):
            while not receiver.got:
                time.sleep(0.01)
    assert receiver.told() == [("operation.began", "start"), ("operation.passed", "start")]
    assert len(receiver.tries) == 4


def test_one_that_hangs_holds_nothing_up(
    told: Told, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events.Outbox.close, "__defaults__", (0.3,))
    with receiving() as other:
        receiver.answer = lambda _event: None
        told.subscribe({"chat": told.hook(receiver), "well": told.hook(other)})
        told.clone()
        assert other.told() == [("operation.began", "clone"), ("operation.passed", "clone")]
        assert len(receiver.tries) == 1
        assert [row for row in told.rows("subscriber, tries") if row[0] == "well"] == []
        with told.site() as site:
            (warning,) = status(site).warnings
        assert "no answer before the command's end" in warning
        told.clone()
        assert len(receiver.tries) == 1, "one at a time"


def test_a_drip_is_ended(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well within the socket's own time limit."""
    monkeypatch.setattr(webhook, "_LIMIT", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def drip() -> None:
            client, _ = server.accept()
            with client:
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10**4:
                    if over.wait(0.1):
                        return
                    try:
                        client.sendall(bytes((byte,)))
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        told.subscribe({"chat": {"webhook": url, "secret_file": "secret"}})
        told.clone()
        over.set()
        thread.join()
    assert told.rows("why")[0][0].endswith("gave no answer within 0.4 s")


@pytest.mark.parametrize("status_", [301, 307, 404, 401, 500])
def test_what_may_change_is_tried_again(told: Told, receiver: Receiver, status_: int) -> None:
    receiver.answer = lambda _event: status_
    told.subscribe({"chat": told.hook(receiver, on="operation.passed")})
    told.clone()
    assert len(receiver.tries) == 1, "redirects are not followed"
    assert len(told.rows()) == 1


def test_what_is_refused_is_given_up_and_told(told: Told, receiver: Receiver) -> None:
    receiver.answer = lambda event: 422 if event["type"] == "operation.began" else 204
    told.subscribe({"chat": told.hook(receiver)})
    told.clone()
    assert receiver.told() == [("operation.passed", "clone")]
    assert told.rows() == []
    with told.site() as site:
        (warning,) = status(site).warnings
    assert warning.startswith("events for chat: 1 event given up in the last 7 days: http://127.0.0.1")
    assert "answered 422" in warning


def test_what_nobody_takes_for_days_is_given_up(told: Told, receiver: Receiver) -> None:
    receiver.answer = lambda _event: 500
    told.subscribe({"chat": told.hook(receiver, on="operation.passed")})
    told.clone()
    with told.site() as site:
        path = site.paths.journal
    for tries, left in ((events._TRIES - 2, 1), (events._TRIES - 1, 0)):
        db = sqlite3.connect(path)
        with db:
            changed = "UPDATE outbox SET tries = ?, due = 0, at = '2026-01-01T00:00:00+00:00'"
            db.execute(changed, (tries,))
        db.close()
        with told.site() as site:
            site.prepare()
        assert len(told.rows()) == left
    with told.site() as site:
        assert "1 event given up" in status(site).warnings[0]


def test_what_nobody_foresaw_in_a_subscriber_is_given_up_too(
    told: Told, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is noted with its type and words, throws no traceback, and holds up no event for ever."""
    monkeypatch.setitem(kinds.subscribers, "file", f"{__name__}:FileSubscriber")

    def broken(*_: object) -> None:
        raise LookupError("nobody thought of this")

    monkeypatch.setattr(_Appending, "deliver", broken)
    monkeypatch.setattr(_Appending, "check", broken)
    told.subscribe({"mine": {"file": "told", "on": "operation.passed"}})
    told.clone()
    assert told.rows("tries, why") == [(1, "it met LookupError: nobody thought of this")]
    first, second = (c for c in examine(told.farm.file).checks if c.name.startswith("events"))
    assert first.text == "it met LookupError: nobody thought of this"
    assert second.text.startswith("events for mine: 1 event not delivered yet: it met LookupError")
    with told.site() as site:
        path = site.paths.journal
    db = sqlite3.connect(path)
    with db:
        changed = "UPDATE outbox SET tries = ?, due = 0, at = '2026-01-01T00:00:00+00:00'"
        db.execute(changed, (events._TRIES - 1,))
    db.close()
    with told.site() as site:
        site.prepare()
    assert told.rows() == []
    with told.site() as site:
        assert "1 event given up" in status(site).warnings[0]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("host", ["chat..example", f"{'a' * 64}.example"])
def test_a_name_that_no_host_can_have_is_no_trouble_of_ours(told: Told, host: str) -> None:
    """The farm file refuses it; a caller that has it all the same hears of it as of a host that isn't
    there."""
    hook = webhook.Webhook(
        webhook.WebhookSubscriber(webhook=f"https://{host}/x", secret_file=told.secret), told.place
    )
    with pytest.raises(events.Undelivered, match="can't be a host name"):
        hook.deliver(Event("evt_1", "operation.passed", b"{}"))


def test_the_queue_is_bounded(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MOST", 5)
    told.subscribe({"chat": {"webhook": "http://127.0.0.1:1/", "secret_file": "secret"}})
    with told.site() as site:
        site.prepare()
        for _ in range(6):
            with started(site):
                pass
    assert len(told.rows()) == 5
    with told.site() as site:
        assert any("more than 5 events were waiting" in text for text in status(site).warnings)


@pytest.mark.parametrize("gone", ["absent", "readable", "short", "not base64"])
def test_a_secret_that_is_none_is_told(told: Told, receiver: Receiver, gone: str) -> None:
    told.subscribe({"chat": told.hook(receiver)})
    if gone == "absent":
        told.secret.unlink()
    elif gone == "readable":
        told.secret.chmod(0o644)
    else:
        told.secret.write_text("short" if gone == "short" else "whsec_%%%")
    told.clone()
    assert receiver.tries == []
    assert len(told.rows()) == 2, "they wait until it is mended"
    words = {"absent": "cannot read the webhook's secret", "readable": "others may read or change",
             "short": "at least 16 are needed", "not base64": "base64 is expected"}[gone]  # fmt: skip
    checks = [c for c in examine(told.farm.file).checks if c.name.startswith("events")]
    assert words in checks[0].text
    assert words in checks[1].text, "and what waits"
    if gone == "readable":
        assert checks[0].remedy == f"chmod 600 {told.secret}"


def test_a_secret_from_the_environment_goes_to_no_command(
    told: Told, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_SECRET", SECRET)
    told.subscribe(
        {"chat": {"webhook": receiver.url, "secret_variable": "CHAT_SECRET"}},
        tell={"command": ["sh", "-c", "{ env; cat; } >> told"], "on": "operation.passed"},
    )
    monkeypatch.chdir(told.place)
    told.clone()
    assert len(receiver.got) == 2
    wrote = (told.place / "told").read_text()
    assert '"operation.passed"' in wrote
    assert SECRET not in wrote
    assert "CHAT_SECRET" not in wrote
    assert "PATH=" in wrote


def test_a_command_that_fails_or_hangs_or_is_not_there(told: Told) -> None:
    told.subscribe(
        None,
        fails={"command": ["sh", "-c", "echo no room >&2; exit 3"], "on": "operation.passed"},
        hangs={"command": ["sh", "-c", "sleep 60"], "timeout": 1, "on": "operation.passed"},
        none={"command": ["./nothing-here"], "on": "operation.passed"},
    )
    told.clone()
    why = dict(told.rows("subscriber, why"))
    assert why["fails"] == "sh exited with 3: no room"
    assert why["hangs"] == "sh was still running after 1 s: ended"
    assert "No such file" in why["none"]
    named = {check.name: check.text for check in examine(told.farm.file).checks}
    assert named["events for none"] == f"there is no command {told.place}/nothing-here"


def test_tls_is_verified(told: Told, place: Path) -> None:
    from tests.unit.tls import serving

    with serving(place) as (url, ca):
        for trusted in (False, True):
            more = {"ca": str(ca)} if trusted else {}
            told.subscribe({"chat": {"webhook": url, "secret_file": "secret", **more}})
            told.clone()
            with told.site() as site:
                farm.destroy(site, ["prod"])
            if not trusted:
                assert "its certificate isn't trusted" in told.rows("why")[0][0]
            told.due()
        with told.site() as site:
            site.prepare()
        assert told.rows() == []


def test_destroying_the_farm_is_told_before_its_journal_goes(told: Told, receiver: Receiver) -> None:
    told.subscribe({"chat": told.hook(receiver)})
    told.clone()
    with told.site() as site:
        farm.destroy(site, ())
        assert not site.paths.journal.exists()
        assert not site.paths.locks.exists()
    assert receiver.told()[-1] == ("operation.passed", "destroy")


def test_several_commands_at_once_keep_the_order(told: Told, receiver: Receiver) -> None:
    told.subscribe({"chat": told.hook(receiver)})
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import cli.composition\n"
        "from inventory.loader import load\n"
        "from provision.engine.facts import NoFacts\n"
        "from provision.engine.report import QuietReporter\n"
        "from provision.power import START\n"
        "from provision.site import Site\n"
        "with Site(load(Path(sys.argv[1])), reporter=QuietReporter()) as site:\n"
        "    site.prepare()\n"
        "    for _ in range(8):\n"
        "        with site.journal.begin(START, ['prod'], NoFacts()):\n"
        "            pass\n"
    )
    argv = [sys.executable, "-c", code, str(told.farm.file)]
    children = [subprocess.Popen(argv, cwd=ROOT) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    with told.site() as site:
        site.prepare()
    assert told.rows() == []
    ended: set[int] = set()
    begun: set[int] = set()
    for event in {event["id"]: event for event in receiver.got}.values():
        number = event["data"]["operation"]["id"]
        if event["type"] == "operation.began":
            assert number not in ended
            begun.add(number)
        else:
            assert number in begun
            ended.add(number)
    assert len(begun) == len(ended) == 24


def test_an_operation_that_is_none_is_told(told: Told, receiver: Receiver) -> None:
    told.subscribe({"chat": told.hook(receiver, operations=["reset", "rest"])})
    (check,) = [c for c in examine(told.farm.file).checks if c.name == "events for chat"]
    assert check.text == "history never has rest, so nothing is told of it"
    assert "reset" in str(check.remedy)


def test_a_kind_of_ones_own(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.subscribers, "file", "tests.unit.test_events:FileSubscriber")
    told.subscribe(None, mine={"file": "told"}, other={"file": ""})
    with pytest.raises(InventoryError, match=r"events\.other\.file: it is empty"):
        load(told.farm.file)
    told.subscribe(None, mine={"file": "told", "on": "operation.passed"})
    told.clone()
    (line,) = (told.place / "told").read_text().splitlines()
    assert json.loads(line)["data"]["operation"]["verb"] == "clone"


def test_what_left_the_farm_file_is_forgotten_after_days(told: Told, receiver: Receiver) -> None:
    receiver.answer = lambda _event: 500
    told.subscribe({"old": told.hook(receiver, on="operation.passed")})
    told.clone()
    told.subscribe({"chat": told.hook(receiver)})
    for age, left in (("2100-01-01", 1), ("2026-01-01", 0)):
        with told.site() as site:
            db = sqlite3.connect(site.paths.journal)
            with db:
                db.execute("UPDATE outbox SET at = ? WHERE subscriber = 'old'", (age,))
            db.close()
            site.prepare()
            with started(site):
                pass
        assert told.rows("subscriber").count(("old",)) == left


def test_farm_files_are_checked(told: Told) -> None:
    told.subscribe(
        {
            "chat": {"webhook": "http://chat.example/x", "secret_file": "s"},
            "login": {"webhook": "https://me:pass@chat.example/x", "secret_file": "s"},
            "both": {"webhook": "https://chat.example/x", "secret_file": "s", "secret_variable": "S"},
            "none": {"webhook": "https://chat.example/x", "vms": ["nope"]},
            "word": {"webhook": "https://chat.example/x", "secret_file": "s", "on": "builds"},
            "dots": {"webhook": "https://chat..example/hush", "secret_file": "s"},
            "long": {"webhook": f"https://{'a' * 64}.example/hush", "secret_file": "s"},
            "root": {"webhook": "https://chat.example./hush", "secret_file": "s"},
            "six": {"webhook": "https://[fd00::6]/hush", "secret_file": "s"},
        },
        empty={"command": []},
        two={"command": "x", "webhook": "https://chat.example/x"},
        neither={"commands": "x"},
    )
    with pytest.raises(InventoryError) as refused:
        load(told.farm.file)
    text = str(refused.value)
    for words in (
        "only an address of this very machine may do without TLS", "a URL without a login",
        "there is 'secret_file' already", "a webhook needs a secret", "did you mean 'build'?",
        "events.empty.command: at least one is needed",
        "events.two: a subscriber has one of 'webhook' and 'command', which says where it is; this one "
        "has webhook and command",
        "events.neither: a subscriber has one of 'webhook' and 'command', which says where it is",
    ):  # fmt: skip
        assert words in text
    for name, wrong in (("dots", True), ("long", True), ("root", False), ("six", False)):
        assert (f"events.{name}.webhook: each part of its host name has 1 to 63" in text) is wrong
    assert "pass@" not in text
    assert "hush" not in text
    hook = {"webhook": "https://chat.example/x", "secret_file": "s"}
    told.subscribe({"one": {**hook, "vms": "nope"}})
    with pytest.raises(InventoryError, match="no VM 'nope'"):
        load(told.farm.file)
