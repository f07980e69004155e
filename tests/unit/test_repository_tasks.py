"""The tasks of package repositories, as somebody types them: what they say, and that --plan is what is
then done and changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inventory.errors import Interrupted
from provision.engine.report import QuietReporter
from provision.operations.repository_sync import SYNC, SyncFacts
from provision.site import open_site
from tests.repos import FARM, contents, package
from tests.unit.cli_farm import CommandLine, command_line

SECOND = """\
  others: {format: rpm}
"""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    for made in command_line(tmp_path):
        made.farm.write_text(FARM.format(format="deb", top=tmp_path / "repository", more=""))
        yield made


@pytest.fixture
def filled(cli: CommandLine) -> CommandLine:
    directory = cli.directory / "in"
    directory.mkdir()
    package("deb", directory)
    package("deb", directory, "other")
    assert cli("repo-add", "--path", "in").status == 0
    return cli


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("repo-add", 2, "which packages?"),
        ("repo-add --path in --build last", 2, "which packages?"),
        ("repo-add --path none.deb", 1, "there is no file"),
        ("repo-add --path /dev/null", 1, "is not called as a deb package is"),
        ("repo-add --path .", 1, "no .deb file is in"),
        ("repo-add --path in --channel live", 2, "no channel live: it has experimental, tested"),
        ("repo-add --path in --component x", 2, "no component x: it has main"),
        ("repo-add --path in --repo x", 2, "no repository is called x: there is packages"),
        ("repo-add --build none", 1, "has no build record"),
        ("repo-remove", 2, "nothing to remove"),
        ("repo-remove --package no --package hello=9", 1, "has no package no, hello=9"),
        ("repo-promote", 2, "--from is missing"),
        ("repo-promote --from experimental", 2, "--to is missing"),
        ("repo-promote --from 7 --to tested", 1, "has no generation 7: it has 1"),
        (
            "repo-promote --from tested --to experimental",
            1,
            "nothing was published in packages's channel",
        ),
        ("repo-promote --from experimental --to tested --package no", 1, "has no package no"),
        ("repo-rollback", 2, "--channel is missing"),
        ("repo-rollback --channel experimental", 1, "has had no other generation yet"),
        ("repo-rollback --channel experimental --to 0", 2, "whole number from 1"),
        ("repo-rollback --channel experimental --to 8", 1, "never had generation 8"),
        ("repo-import", 2, "--source is missing"),
        ("repo-import --source none", 1, "there is no directory"),
        ("repo-import --source in", 1, "no Debian archive"),
        ("repo-list --which tested", 1, "nothing was published"),
        ("repo-list --which " + "9" * 5000, 2, "has no channel 999"),
        ("repo-show --which 5", 1, "has no generation 5: it has 1"),
        ("repo-diff --from 1", 2, "--to is missing"),
        ("repo-diff --from 1 --to x", 2, "has no channel x"),
        ("repo-log --channel x", 2, "has no channel x"),
        ("repo-client --generation x", 2, "whole number"),
        ("repo-client --generation 1 --at 2026-01-01", 2, "which is meant?"),
        ("repo-client --at soon", 2, "is no time"),
        ("repo-client --at 2020-01-01", 1, "had nothing at that time"),
        ("repo-why", 2, "--package is missing"),
        ("repo-why --package no", 1, "has no package no"),
        ("repo-gc --repo x", 2, "no repository is called x"),
        ("repo-fsck --repo x", 2, "no repository is called x"),
    ],
)
def test_wrong_words(filled_once: CommandLine, words: str, status: int, says: str) -> None:
    before = contents(filled_once.directory / "repository")
    done = filled_once(*words.split())
    assert (done.status, done.out) == (status, ""), done
    assert says in done.error
    assert len(done.error) < 6000
    if "--repo x" in words:  # a few of them
        told = filled_once(*words.split(), "--json").json
        assert told["ok"] is False
        assert says in told["message"]
    assert contents(filled_once.directory / "repository") == before


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    directory = tmp_path_factory.mktemp("tasks")
    for made in command_line(directory):
        made.farm.write_text(FARM.format(format="deb", top=directory / "repository", more=""))
        (directory / "in").mkdir()
        package("deb", directory / "in")
        assert made("repo-add", "--path", "in").status == 0
        yield made


def test_plans_are_what_is_then_done_and_change_nothing(cli: CommandLine) -> None:
    directory = cli.directory / "in"
    directory.mkdir()
    package("deb", directory)
    package("deb", directory, "other", "2.0-1")
    for words in (
        "repo-add --path in",
        "repo-add --path in",
        "repo-promote --from experimental --to tested",
        "repo-remove --package other",
        "repo-promote --from 1 --to experimental --package other",
        "repo-rollback --channel experimental",
        "repo-gc",
    ):
        before = contents(cli.directory)
        planned = cli(*words.split(), "--plan", "--json").json
        told = cli(*words.split(), "--plan").out
        assert contents(cli.directory) == before, f"{words} --plan changed something"
        done = cli(*words.split(), "--json").json
        assert planned["actions"] == done["actions"], words
        assert planned["changed"] == done["changed"]
        for action in planned["actions"]:
            assert action["text"] in told
    assert not contents(cli.directory).keys() - before.keys() & {"state"}
    history = cli("history").out
    for task in ("repo-add", "repo-promote", "repo-remove", "repo-rollback"):
        assert task in history


def test_a_plan_of_the_first_command_makes_nothing(cli: CommandLine) -> None:
    file = package("deb", cli.directory)
    before = contents(cli.directory)
    for words in (
        f"repo-add --path {file} --plan", "repo-gc --plan", "repo-gc", "repo-fsck", "repo-list",
        "repo-list --channels", "repo-log", "repo-client", "repo-show", "repo-diff --from 1 --to 2",
    ):  # fmt: skip
        cli(*words.split())
        cli(*words.split(), "--json").json  # noqa: B018 - it is one object
    made = contents(cli.directory).keys() - before.keys()
    assert not [name for name in made if name.startswith("repository")]


def test_json_of_all_that_shows_something(filled: CommandLine) -> None:
    for words in (
        "repo-list", "repo-list --channels", "repo-show", "repo-log", "repo-fsck", "repo-client",
        "repo-client --generation 1", "repo-client --at 2099-01-01", "repo-client --plain",
        "repo-why --package hello", "repo-diff --from 1 --to experimental", "repo-gc --plan",
    ):  # fmt: skip
        done = filled(*words.split(), "--json")
        assert done.status == 0, (words, done.err)
        assert done.json["ok"] is True
        assert filled(*words.split()).out.strip()
    assert len(filled("repo-list", "--json").json["packages"]) == 2


def test_damage_is_told_in_a_line_each(filled: CommandLine) -> None:
    top = filled.directory / "repository"
    for pattern in ("pool/*/*/*", ".farmhand/logs/*", ".farmhand/chunks/*/*"):
        for file in top.glob(pattern):
            file.unlink()
            file.write_bytes(b"\xff damaged \n")
    done = filled("repo-fsck")
    assert done.status == 1
    assert "wrong" in done.error
    lines = done.out.splitlines()
    assert all(line.count("; ") for line in lines[1:]), "each has a remedy"
    json.loads(filled("repo-fsck", "--json").out)
    for words in (
        "repo-list",
        "repo-show",
        "repo-add --path in",
        "repo-remove --package hello",
        "repo-gc",
    ):
        again = filled(*words.split())
        assert again.status in (0, 1)


def test_several_repositories(cli: CommandLine) -> None:
    with cli.farm.open("a") as file:
        file.write(SECOND)
    done = cli("repo-log")
    assert done.status == 2
    assert "there are several repositories" in done.error
    assert "say which repo: packages or others" in done.err
    assert "others" in cli("repo-list").out


def test_no_repository_at_all(cli: CommandLine) -> None:
    text = cli.farm.read_text()
    cli.farm.write_text(text[: text.index("repositories:")])
    for task in ("repo-list", "repo-fsck", "repo-gc", "repo-log"):
        done = cli(task)
        assert done.status == 1
        assert "no package repository is declared" in done.error


def test_what_goes_elsewhere_is_in_the_history(
    filled: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in filled.environment.items():
        monkeypatch.setenv(name, value)
    mirror = filled.directory / "mirror"
    assert filled("repo-sync", "--to", str(mirror), "--objects", "--plan").status == 0
    assert "repo-sync" not in filled("history").out
    assert filled("repo-sync", "--to", str(mirror), "--objects").status == 0
    with open_site(filled.farm, reporter=QuietReporter()) as site:
        synced = site.journal.history(1)[0]
        assert (synced.verb, synced.outcome, synced.requester.uid) == ("repo-sync", "done", os.getuid())
        assert synced.facts == {"repository": "packages", "to": str(mirror)}
        with pytest.raises(Interrupted), site.journal.begin(SYNC, [], SyncFacts("packages", "there")):
            raise Interrupted("as if it was killed")
    told = filled("recover")
    assert "there is whole, and the next repo-sync goes on; noted" in told.out + told.err
