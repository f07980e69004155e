"""A build record as one page. ``templates/pages/build.html.j2`` is how it looks; what it says is made
here."""

from __future__ import annotations

from functools import partial

from builds.record import BuildRecord, StepRecord, replace_file
from builds.resume import from_step
from host.html import page_template
from host.program import typed
from inventory.errors import Call, spelled
from inventory.sizes import format_duration

_TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)
_REFRESH = 5  # seconds, while the build runs


def write(record: BuildRecord) -> None:
    """Replace the record's index.html in one step. NoSpace, WrongState if the disk refuses."""
    replace_file(record.page, render(record), durable=False)  # it can be made again from the record


def render(record: BuildRecord) -> str:
    """The page as text."""
    span = max(record.seconds, *(s.offset + s.seconds for s in record.steps if s.started), 0.001)
    word = partial(typed, farm=record.farm_file)
    return page_template("build.html.j2").render(
        build=record,
        failed=record.failed_step,
        span=span,
        ticks=_ticks(span),
        refresh=_REFRESH if record.result == "running" else None,
        bar=lambda step: _bar(step, span),
        glance=_glance(record),
        command=lambda task, **flags: word(Call(task, **flags)),
        spelled=partial(spelled, how=word),
        go_on=lambda step: word(from_step(record.asked, step)),
    )


def _bar(step: StepRecord, span: float) -> str:
    """Left edge and width as CSS; what is too short to see still shows."""
    left = min(step.offset / span * 100, 99.6)
    width = min(max(step.seconds / span * 100, 0.4), 100 - left)
    return f"left:{left:.2f}%;width:{width:.2f}%"


def _ticks(span: float) -> list[tuple[str, str]]:
    """Position (CSS) and label of the axis's marks: five to ten round ones."""
    every = next((tick for tick in _TICKS if span / tick <= 8), _TICKS[-1])
    count = int(span / every)
    return [
        (f"left:{n * every / span * 100:.2f}%", _clock(n * every)) for n in range(count + 1)
    ]  # fmt: skip


def _clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _glance(record: BuildRecord) -> str:
    """One sentence."""
    took = format_duration(record.seconds)
    step = record.failed_step
    if record.result in ("passed", "partial"):
        count = len(record.outputs)
        files = f", {count} file{'s' * (count != 1)} came out" if count else ""
        done = sum(s.status == "passed" for s in record.steps)
        if record.partial:
            return f"{done} of {len(record.steps)} steps run and passed in {took}{files}."
        return f"{done} step{'s' * (done != 1)} passed in {took}{files}."
    if record.result == "running":
        now = next((s for s in record.steps if s.status == "running"), None)
        return f"Running for {took}{f', now at {now.name} on {now.vm}' if now else ''}."
    at = f" at step {step.name} on {step.vm}" if step else ""
    part = f" Only {record.partial} of the steps were to be run." if record.partial else ""
    return f"{record.result.capitalize()}{at}, after {took}.{part}"
