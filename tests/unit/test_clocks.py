"""The wall clock is set back while a cycle runs: it is for telling alone, and durations are not its."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from cycle_farm import STEPS, Lab, lab, run_cycle

from builds import record as record_module
from builds.record import all_records, find_record
from cli import views
from provision.engine import journal as journal_module
from provision.guest.connection import Connection

__all__ = ["lab"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each look at the clock, which is set an hour back before it."""
    seen: list[int] = []

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            seen.append(len(seen) + 1)
            return datetime.now(tz) - timedelta(hours=len(seen))

    async def no_clock(_self: Connection) -> float:
        pytest.fail("the test's guests have this machine's clock: it is not to be set")

    monkeypatch.setattr(Connection, "set_clock", no_clock)
    for module in (record_module, journal_module):
        monkeypatch.setattr(module, "datetime", Jumping)
    return seen


def test_a_cycle_goes_on_while_the_clock_is_set_back(lab: Lab, looks: list[int]) -> None:
    """The last build is the one begun last, whatever the clock said."""
    with lab.site(STEPS) as site:
        first, second = run_cycle(site), run_cycle(site)
        builds, unreadable = all_records(site.paths)
        history = views.history(site.journal.history(50), builds, 50, unreadable)
        last = find_record(site.paths)
        assert not site.locks.held()
    assert len(looks) > 10
    for build in (first, second):
        assert build.result == "passed"
        assert 0 <= build.seconds < 3600
        assert all(0 <= step.seconds < 3600 and 0 <= step.offset < 3600 for step in build.steps)
    assert second.started < first.started
    assert last.id == second.id
    assert not [word for word in str(history.text).split() if word.startswith("-")]
