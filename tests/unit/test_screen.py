"""Progress: what reaches stderr, off a terminal and on one."""

from __future__ import annotations

import io
import threading

from cli.screen import LiveScreen, Screen, open_screen


def test_lines_are_dated_and_name_the_vm() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.say("started", vm="prod")
    screen.warn("slow")
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == ["prod: started", "warning: slow"]


def test_output_of_a_guest_is_shown_by_whole_lines() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.stream("dev2", b"gcc -c ka")
    screen.stream("prod", b"other\n")
    screen.stream("dev2", b"ta.c\nlast")
    screen.close()
    assert out.getvalue() == "prod | other\ndev2 | gcc -c kata.c\ndev2 | last\n"


def test_a_guest_cannot_drive_the_terminal() -> None:
    out = io.StringIO()
    Screen(out).stream("dev2", b"\x1b[31mred\x1b[0m \x1b]0;title\x07 10%\r100%\x08\n\xff\n")
    assert out.getvalue() == "dev2 | 100%\\x08\ndev2 | \ufffd\n"


def test_what_is_said_is_text_on_lines_of_its_own() -> None:
    out, live = io.StringIO(), io.StringIO()
    Screen(out).say("said \x1b[2J:\nfarmhand: fetched\u202e", vm="dev2")
    assert [line[9:] for line in out.getvalue().split("\n")] == [
        "dev2: said \\x1b[2J:", "dev2:   farmhand: fetched\\u202e", "",
    ]  # fmt: skip
    screen = LiveScreen(live)
    screen.working("waiting \x1b]0;owned\x07", vm="dev2")
    screen.close()
    assert "waiting \\x1b]0;owned\\x07" in live.getvalue()
    assert "\x1b" not in live.getvalue().replace("\r\x1b[2K", "")


def test_the_live_line_stays_on_one_line_and_goes_away(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out = io.StringIO()
    screen = LiveScreen(out)
    screen.working("waiting for ssh, which takes a while", vm="dev2")
    screen.working("defining", vm="prod")
    screen.say("ready", vm="dev2")
    screen.close()
    drawn = out.getvalue().replace("\n", "\r\x1b[2K").split("\r\x1b[2K")
    assert max(len(part) for part in drawn) < 30
    assert drawn[-1] == ""
    assert any(part.endswith("dev2: ready") for part in drawn)


def test_how_far_it_is_is_no_news(monkeypatch) -> None:
    """What follows a semicolon: on a terminal the clock runs on, in a log there is a line a minute."""
    now = 1000.0
    monkeypatch.setattr("cli.screen.time.monotonic", lambda: now)
    out, live = io.StringIO(), LiveScreen(io.StringIO())
    screen = Screen(out)
    for _ in range(150):
        now += 1
        screen.working(f"waiting for ssh; console {now:g}", vm="dev2")
        live.working(f"waiting for ssh; console {now:g}", vm="dev2")
    assert live._under_way["dev2"] == (f"waiting for ssh; console {now:g}", 1001.0)
    live.close()
    assert len(out.getvalue().splitlines()) == 3
    screen.working("stopping", vm="dev2")
    assert len(out.getvalue().splitlines()) == 4


def test_many_threads_never_mix_lines() -> None:
    out = io.StringIO()
    screen = Screen(out)
    threads = [
        threading.Thread(target=lambda n=n: [screen.say(f"line {n}", vm="vm") for _ in range(50)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = out.getvalue().splitlines()
    assert len(lines) == 400
    assert all(len(line.split()) == 4 for line in lines)


def test_no_terminal_no_control_sequences() -> None:
    assert type(open_screen(io.StringIO())) is Screen
