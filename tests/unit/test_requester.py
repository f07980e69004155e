"""Who asked: by what the kernel says, and the same in journal, locks, build records and history."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cli import views
from inventory.loader import load
from provision.engine import requester
from provision.engine.facts import NoFacts
from provision.engine.report import QuietReporter
from provision.engine.requester import Requester
from provision.power import START
from provision.site import Site

ROOT = Path(__file__).parents[2]
JUHA = Requester(user="root", uid=0, login="juha", tty="pts/3")


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (Requester(user="juha", uid=1000), "juha"),
        (Requester(user="juha", uid=1000, tty="pts/3"), "juha (pts/3)"),
        (JUHA, "juha as root (pts/3)"),
        (Requester(token="ci"), "token ci"),
        (requester.NOBODY, "somebody"),
    ],
)
def test_in_words(who: Requester, words: str) -> None:
    assert str(who) == words


def asked(*prefix: str, **environment: str) -> dict[str, object]:
    """By a process of its own."""
    code = (
        "import json; from provision.engine.requester import Requester\n"
        "print(json.dumps(Requester.of_process().as_dict()))"
    )
    argv = [*prefix, sys.executable, "-c", code]
    found = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    told: dict[str, object] = json.loads(found.stdout)
    return told


def test_the_environment_can_claim_nothing() -> None:
    plain = asked()
    assert plain["uid"] == os.getuid()
    claims = dict.fromkeys(("USER", "LOGNAME", "USERNAME"), "mallory")
    assert asked(**claims) == plain
    assert asked(SUDO_USER="nobody", SUDO_UID="65534") == plain, "no login confirms it"


def test_an_account_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 3999999)
    assert Requester.of_process().user == "uid 3999999"


@pytest.mark.parametrize(
    ("login", "sudo", "name"),
    [
        ("65534", "", "nobody"),  # su
        ("65534", "nobody", "nobody"),  # sudo
        ("65534", "daemon", "nobody"),  # claimed
        ("65534", "no-such-account", "nobody"),
        (str(os.getuid()), "daemon", ""),
        ("4294967295", "daemon", ""),  # nobody logged in
        ("", "daemon", ""),  # a kernel without audit
    ],
)
def test_who_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str, sudo: str, name: str
) -> None:
    """The file stands for the kernel's, which only a login may write."""
    (tmp_path / "loginuid").write_text(login)
    monkeypatch.setattr(requester, "_LOGIN_UID", tmp_path / "loginuid")
    monkeypatch.setenv("SUDO_USER", sudo)
    assert Requester.of_process().login == name


def test_the_terminal() -> None:
    ours, theirs = pty.openpty()
    code = "from provision.engine.requester import Requester; print(Requester.of_process().tty)"
    try:
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdin=theirs, capture_output=True, check=True
        )
        assert found.stdout.decode().strip() == os.ttyname(theirs).removeprefix("/dev/")
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    file = tmp_path / "farm.yaml"
    file.write_text("farm: who\nhosts: {here: {driver: fake}}\n"
                    "templates: {base: {build: debian-12}}\nvms: {prod: {}}\n")  # fmt: skip
    with Site(load(file), reporter=QuietReporter(), requester=JUHA) as site:
        site.prepare()
        with site.locks.hold("vm-prod", doing="reset"), site.journal.begin(START, ["prod"], NoFacts()):
            holder = site.locks.holder("vm-prod")
            assert holder
            assert f"of juha as root (pts/3), since {holder.since.astimezone():%Y}" in str(holder)
        (record,) = site.journal.history()
    assert record.requester == JUHA
    assert record.as_dict()["requester"] == {
        "user": "root", "uid": 0, "login": "juha", "tty": "pts/3", "token": "",
    }  # fmt: skip
    heading, row = str(views.history([record], [], 20).text).splitlines()
    assert "BY" in heading
    assert "juha as root (pts/3)" in row
