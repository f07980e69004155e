"""Options that tasks share, judged: they reach a task as strings, since invoke's own conversion
(``--count abc``) shows a traceback. UsageError or UnknownName, with what could be meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from inventory.errors import UnknownName, UsageError, did_you_mean, some

if TYPE_CHECKING:
    from datetime import datetime, time

    from provision.site import Site

FlagValues = Sequence[str] | None
"""Of a flag that may be given again and again; None: it isn't."""
BUILD = (
    "Its id, a commit's beginning, a branch, a version, last-good; a package's build, such as hello/7; "
    "absent: the cycle's last one."
)
"""What a task takes for a build, in its help."""
_DIGITS = 9
"""Of a count: more is never meant, and not everything takes it."""


def names(
    values: Iterable[str] | None, option: str = "--vm", of: str = "a VM of the farm"
) -> tuple[str, ...]:
    """``--vm a --vm b`` and ``--vm a,b`` alike; each once, in their order."""
    found = [part.strip() for value in values or () for part in str(value).split(",")]
    if not all(found):
        raise UsageError(f"{option}: an empty name", remedy=f"give the name of {of}")
    return tuple(dict.fromkeys(found))


def vms_or_all(site: Site, vm: Iterable[str] | None, all_: bool) -> tuple[str, ...]:
    """The VMs meant, known ones only."""
    return site.vms(some_or_all(site, vm, all_))


def some_or_all(site: Site, vm: Iterable[str] | None, all_: bool) -> tuple[str, ...] | None:
    """The names given; None for --all. An empty choice is refused: it is never "all" by accident."""
    chosen = names(vm)
    if chosen and all_:
        raise UsageError("--vm and --all together: which is meant?", remedy="give one of them")
    if not chosen and not all_:
        raise UsageError(
            "which VMs?",
            remedy=f"name one or several, or --all; the farm has {some(site.farm.vms)}",
        )
    return chosen or None


def one_vm(site: Site, vm: str) -> str:
    """The one VM meant; where the farm has a single one, that."""
    if not vm and len(site.farm.vms) > 1:
        raise UsageError("which VM?", remedy=f"name one; the farm has {some(site.farm.vms)}")
    return site.vms(names([vm]) if vm else None)[0]


def size(option: str, text: str) -> int:
    """Bytes."""
    from inventory.sizes import parse_size

    if not text:
        raise UsageError(f"{option} is missing", remedy=f"{option} SIZE, such as {option} 512M")
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def count(option: str, text: str, *, least: int = 1) -> int:
    digits = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    if not digits or int(text) < least:
        raise UsageError(
            f"{option}: {text[:60]!r} is not a whole number from {least} to {10**_DIGITS - 1}",
            remedy=f"{option} 20",
        )
    return int(text)


def moment(option: str, text: str) -> datetime:
    """A time of this machine's zone, where it names no other; of a day alone, its end."""
    from datetime import time

    return _moment(option, text, time.max, f"{option} 2026-11-20, or 2026-11-20T18:00")


def since(option: str, text: str) -> datetime:
    """A time as ``moment`` has it, but of a day alone its beginning; "today", "yesterday"; or how long
    ago, such as "2 days" or "1h30m"."""
    import re
    from datetime import datetime, time, timedelta

    from inventory.sizes import parse_duration

    now, words = datetime.now().astimezone(), text.strip().lower().removesuffix(" ago")
    if words in _DAYS:
        day = now.date() - timedelta(days=_DAYS[words])
        return datetime.combine(day, time.min).astimezone()
    count = re.fullmatch(r"([0-9]{1,6}) *([a-z]+?)s?", words)
    try:
        if count and count[2] in _SPANS:
            return now - timedelta(**{_SPANS[count[2]]: int(count[1])})
        if not words.isdigit():  # a number alone tells nothing
            return now - timedelta(seconds=parse_duration(words))
    except (ValueError, OverflowError):
        pass
    return _moment(option, text, time.min, f'{option} "2 days", yesterday, 2026-11-20, 2026-11-20T18:00')


_DAYS = {"today": 0, "yesterday": 1}
_SPANS = {
    "minute": "minutes", "min": "minutes", "hour": "hours", "day": "days", "d": "days", "week": "weeks",
}  # fmt: skip


def _moment(option: str, text: str, of_a_day: time, remedy: str) -> datetime:
    from datetime import datetime

    try:
        found = datetime.fromisoformat(text)
        return (datetime.combine(found, of_a_day) if len(text) <= 10 else found).astimezone()
    except (ValueError, OverflowError):
        raise UsageError(f"{option}: {text[:60]!r} is no time", remedy=remedy) from None


def is_package_build(site: Site, build: str) -> bool:
    """Whether this is a package's build, such as hello/7, and no branch that was built."""
    from builds.record import load_records

    return "/" in build and not any(one.source.is_named(build) for one in load_records(site.paths))


def needed(option: str, text: str, meaning: str) -> str:
    """An option that has no sensible default."""
    if not text.strip():
        raise UsageError(f"{option} is missing", remedy=f"{option}: {meaning}")
    return text.strip()


def template(site: Site, name: str, *, built: bool) -> str:
    """The template meant: the named one, or the only one that is built (or imported)."""
    known = site.farm.templates
    if name:
        if name not in known:
            raise UnknownName(
                f"{site.farm.path}: there is no template {name!r}",
                remedy=did_you_mean(name, known, f"it has {', '.join(known) or 'none'}"),
            )
        return name
    fitting = [key for key, source in known.items() if (source.build is not None) == built]
    if len(fitting) != 1:
        kind = "built" if built else "imported"
        raise UsageError(
            f"which template? the farm has {len(fitting)} that are {kind}",
            remedy=f"--name NAME: {', '.join(fitting or known) or 'declare one in the farm file'}",
        )
    return fitting[0]
