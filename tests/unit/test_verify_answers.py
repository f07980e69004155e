"""network-verify: what could not be told is known by what happened, not by its words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from provision.network.service import NotAsked, Question, Silent
from provision.network.verify import _answer


def raises(error: Exception) -> Callable[[], str]:
    def ask() -> str:
        raise error

    return ask


@pytest.mark.parametrize(
    ("expected", "ask", "told"),
    [
        (lambda: "a", lambda: "a", ("a", "a", True, "")),
        (lambda: "a", lambda: "could not be right", ("a", "could not be right", False, "")),
        (lambda: "no answer is right", lambda: "b", ("no answer is right", "b", False, "")),
        (lambda: "a", raises(Silent("refused")), ("a", "no answer (refused)", False, "")),
        (raises(Silent()), lambda: "b", ("no answer", "b", None, "the VM itself: no answer")),
        (lambda: "a", raises(NotAsked("no file")), ("a", "no file", None, "no file")),
    ],
    ids=["right", "wrong", "another", "silent", "its VM is silent", "not asked"],
)
def test_how_it_is_told(expected: Callable[[], str], ask: Callable[[], str], told: object) -> None:
    answer = _answer(Question("bind", "prod", "a question", expected, ask))
    assert (answer.expected, answer.seen, answer.ok, answer.why) == told
