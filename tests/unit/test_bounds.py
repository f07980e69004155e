"""What a build may leave here: its log, its files, and how a step ends that wants more."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, lab, reset, run, run_cycle
from sshd_machine import free_port, gone

from builds.record import BuildRecord, find_record
from builds.step_run import StepLog
from cli.screen import Screen
from inventory.errors import BuildFailed, spelled

__all__ = ["lab"]


def failed(laboratory: Lab, steps: list[dict], **farm) -> tuple[BuildFailed, BuildRecord]:
    with laboratory.site(steps, **farm) as site:
        with pytest.raises(BuildFailed) as caught:
            run_cycle(site, keep_going=True)
        return caught.value, find_record(site.paths, caught.value.build)


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_a_log_is_kept_up_to_its_limit(lab: Lab) -> None:
    steps = [
        run("flood", "echo $$ >pid; echo begin; exec yes"),
        run("deps", "yes 'is needed by nobody'", failure="dependencies"),
        run("quiet", ["yes | head -c 40000", "yes | head -c 40000"]),
        run("more", "yes | head -c 80000", limits={"log_size": "100K"}),
    ]
    error, record = failed(lab, steps, limits={"log_size": "64K"})
    assert [(s.status, s.failure) for s in record.steps] == [
        ("failed", "source"), ("failed", "dependencies"), ("failed", "source"), ("passed", ""),
    ]  # fmt: skip
    flood = record.steps[0]
    assert flood.message == "printed more than 64K; ended there"
    assert "larger 'log_size'" in spelled(flood.remedy)
    assert "larger 'log_size'" in spelled(error.remedy)
    data = (record.directory / flood.log).read_bytes()
    assert data.startswith(b"begin\ny\ny\n")
    assert 65536 <= len(data) < 66000
    assert b"\nfarmhand: cut here: this step's log may have 64K (limits: log_size)\n" in data
    assert gone(int((lab.dev2.home / "pid").read_text()))
    assert (record.directory / record.steps[2].log).stat().st_size < 66000, "all its scripts together"


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"files": "2"}, "more than 2 files match"),
        ({"file_size": "1000"}, "out/b has 2K"),
        ({"total_size": "2K"}, "more than 2K together"),
    ],
)
def test_files_over_a_limit_are_the_sources_fault_and_not_taken(
    lab: Lab, limits: dict[str, str], why: str
) -> None:
    make = "mkdir -p out; echo a >out/a; head -c 2048 /dev/zero >out/b; echo c >out/c"
    steps = [
        run("build", make, artifacts="out/*"),
        {"name": "carry", "transfer": "out/*", "from": "dev2", "to": "prod", "into": "in",
         "timeout": "60s"},
        run("enough", "true", artifacts="out/*",
            limits={"files": "3", "file_size": "2K", "total_size": "3K"}),
    ]  # fmt: skip
    error, record = failed(lab, steps, limits=limits)
    assert [(s.status, s.failure) for s in record.steps[:2]] == [("failed", "source")] * 2
    assert record.steps[2].status == "passed"
    for step in record.steps[:2]:
        assert why in step.message
        assert f"larger '{next(iter(limits))}'" in spelled(step.remedy)
    assert names(record.directory / "artifacts") == ["a", "b", "c"]
    assert not (lab.prod.home / "in").exists()
    assert error.remedy


def test_names_never_meet_what_is_there(lab: Lab) -> None:
    """Names of steps, their directories, our own files: each artifact is found by the record."""
    steps = [
        run("one", "echo 1 >two; echo 1 >.two; echo 1 >record.json", artifacts=["two", ".two", "rec*"]),
        run("two", "echo 2 >two", artifacts="two"),
        run("three", "mkdir -p a; echo 3 >a/two; echo 3 >three", artifacts=["a/*", "three"]),
        run("four", "mkdir -p d; echo 4 >d/three; echo 4 >d/two", artifacts=["d/*"]),
    ]
    with lab.site(steps) as site:
        record = run_cycle(site)
    assert [(file.path, (record.directory / file.path).read_text()) for file in record.outputs] == [
        ("artifacts/two", "1\n"),
        ("artifacts/.two", "1\n"),
        ("artifacts/record.json", "1\n"),
        ("artifacts/two.2/two", "2\n"),
        ("artifacts/three/two", "3\n"),
        ("artifacts/three/three", "3\n"),
        ("artifacts/four/three", "4\n"),
        ("artifacts/four/two", "4\n"),
    ]
    assert len(names(record.directory / "artifacts")) == 8


def test_names_that_can_not_be_kept_are_the_sources_fault(lab: Lab) -> None:
    steps = [run("build", "mkdir -p out; touch \"$(printf 'out/a\\nfarmhand: fetched b\\377')\"",
                 artifacts="out/*")]  # fmt: skip
    _, record = failed(lab, steps)
    assert record.steps[0].failure == "source"
    assert record.steps[0].message.isprintable()
    assert b"\nfarmhand: fetched" not in (record.directory / record.steps[0].log).read_bytes()
    assert names(record.directory) == [record.steps[0].log, "index.html", "packages-dev2.txt",
                                       "record.json"]  # fmt: skip


def test_what_arrived_is_kept_when_the_next_one_fails(lab: Lab) -> None:
    """The second one grows until it is fetched."""
    script = """echo a >a; echo b >b
        (while [ ! -e stop ]; do sleep 0.01; echo more; done >>b) >/dev/null 2>&1 &"""
    try:
        _, record = failed(lab, [run("build", script, artifacts=["a", "b"])])
    finally:
        (lab.dev2.home / "stop").touch()
    assert record.steps[0].failure == "source"
    assert "b changed while it was read" in record.steps[0].message
    assert names(record.directory / "artifacts") == ["a"]
    assert [file.name for file in record.outputs] == ["a"]


@pytest.fixture
def hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a lab whose dev2 has such tools."""
    made: list[Lab] = []

    def make(**tools: str) -> Lab:
        for name, value in environment(tmp_path).items():
            if name.startswith("FARMHAND_"):
                monkeypatch.setenv(name, value)
        (tmp_path / "tools").mkdir()
        for name, script in tools.items():
            (tmp_path / "tools" / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "tools" / name).chmod(0o755)
        path = {"PATH": f"{tmp_path}/tools:/usr/bin:/bin"}
        made.append(Lab(tmp_path, dev2={"environment": path, "shell": "/bin/bash"}))
        return made[-1]

    yield make
    for laboratory in made:
        laboratory.stop()


def test_a_list_of_packages_without_end_is_done_without(hollow) -> None:
    laboratory = hollow(**{"dpkg-query": "exec yes 'package 1.0 amd64'"}, sort="exec cat")
    with laboratory.site([run("build", "echo built")]) as site:
        record = run_cycle(site)
    assert record.vms[0].packages == ""
    assert any("packages could not be listed" in note and "8M" in note for note in record.notes)


def test_a_guest_that_does_not_answer_has_the_steps_time(hollow) -> None:
    laboratory = hollow(date="exec sleep 300")
    _, record = failed(laboratory, [{**run("build", "true"), "timeout": "2s"}])
    assert record.steps[0].failure == "time-out"


def test_a_line_without_end_costs_nothing_but_its_log(tmp_path: Path) -> None:
    screen, out = Screen(shown := io.StringIO()), tmp_path / "log"
    log, chunk = StepLog(out, "dev2", screen.stream), b"x" * 32768
    tracemalloc.start()
    try:
        for _ in range(640):
            log.write(chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    screen.close()
    log.close()
    assert out.stat().st_size == 640 * len(chunk)
    assert peak < 4 * 2**20
    assert len(shown.getvalue()) < 5000
    assert max(map(len, log.last(60).split("\n"))) < 3000
    assert max(map(len, log.text().split("\n"))) < 3000


def test_progress_by_carriage_returns_is_shown_as_it_ended() -> None:
    screen = Screen(shown := io.StringIO())
    for percent in range(101):
        screen.stream("dev2", b"\r" + b"." * 300 + b" %d%%" % percent)
    screen.stream("dev2", b"\r\nnext\r\n")
    assert shown.getvalue().splitlines() == [f"dev2 | {'.' * 300} 100%", "dev2 | next"]


def test_reset_and_packages_of_an_honest_guest_are_as_ever(lab: Lab) -> None:
    with lab.site([reset("dev2"), run("build", "true")]) as site:
        record = run_cycle(site)
    assert record.vms[0].packages_count > 0


def test_a_commit_that_only_the_guest_knows_is_one(hollow) -> None:
    laboratory = hollow(git="echo '../../../commit Its subject'")
    nowhere = f"git://127.0.0.1:{free_port()}/kata.git"
    _, record = failed(laboratory, [run("build", "true")], source=nowhere)
    assert record.steps[0].failure == "source"
    assert "no revision 'HEAD'" in record.steps[0].message
    assert record.source.commit == ""
