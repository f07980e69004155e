"""The tasks of farm files: a second farm's from a first one's, and what differs between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cli import options, views
from cli.command import command
from cli.options import FlagValues
from cli.run import TaskResult, TaskRun
from host.printable import one_line
from inventory.base import parse_range
from inventory.errors import Call, Text, UsageError, joined
from inventory.sizes import rounded
from inventory.values import check_hostname, check_label, check_revision, to_address, to_int, to_subnet

if TYPE_CHECKING:
    from provision.twins.asked import TwinEndpoint
    from provision.twins.difference import FarmDifference
    from provision.twins.making import Twin

T = TypeVar("T")
_SHOWN = 70  # characters of a value
_BEFORE = 20  # of them before it differs


@command(
    {
        "as_": "The new farm's name.",
        "out": "Its file; absent: NAME.yaml beside the first farm's.",
        "revision": "What it builds: a branch, tag or commit.",
        "subnet": "A subnet of its own. Absent: addresses of its own in the first farm's.",
        "addresses": "Those that are to be its in the first farm's subnet, FIRST-LAST.",
        "address": "VM=ADDRESS[:PORT]: a VM's, and its ssh's port; repeatable. A must for ssh hosts.",
        "hostname": "VM=NAME: a VM's host name; repeatable.",
        "port_shift": "How much is added to ssh and NAT ports. Absent: the next hundred that is free.",
    },
    iterable=["address", "hostname"],
    plans=True,
)
def farm_twin(
    run: TaskRun, as_: str = "", out: str = "", revision: str = "", subnet: str = "",
    addresses: str = "", address: FlagValues = None, hostname: FlagValues = None, port_shift: str = "",
) -> TaskResult:  # fmt: skip
    """Make a second farm's file from a first one's."""
    from provision.twins.asked import TwinAsked
    from provision.twins.making import twin_of

    name = _read("--as", options.needed("--as", as_, "the new farm's name"), check_label)
    first = run.farm_file()
    asked = TwinAsked(
        name=name,
        out=(Path(out).expanduser() if out else first.with_name(f"{name}.yaml")).absolute(),
        revision=_read("--revision", revision, check_revision) if revision else "",
        subnet=_read("--subnet", subnet, _subnet) if subnet else None,
        range=_read("--addresses", addresses, parse_range) if addresses else None,
        endpoints=_by_vm("--address", address, _endpoint),
        hostnames=_by_vm("--hostname", hostname, check_hostname),
        shift=_read("--port-shift", port_shift, _number) if port_shift else None,
    )
    made = twin_of(first, asked)
    if not run.plan:
        made.write()
    return _twin_view(made, planned=run.plan)


@command(
    {
        "with_": "The other farm's file.",
        "check": "Exit with 1 if something differs, or is the same and must not be.",
    }
)
def farm_diff(run: TaskRun, with_: str = "", check: bool = False) -> TaskResult:
    """Show what differs between two farms."""
    from provision.twins.difference import DifferenceGroup, FarmFile, differences

    other = Path(options.needed("--with", with_, "the other farm's file")).expanduser().absolute()
    first, second = FarmFile.read(run.farm_file()), FarmFile.read(other)
    found = differences(first, second)
    bad = [one for one in found if one.group is not DifferenceGroup.OWN]
    data = {
        "farm": first.farm.farm,
        "with": second.farm.farm,
        "in_step": not bad,
        **{
            str(group): [_as_data(one) for one in found if one.group is group]
            for group in DifferenceGroup
        },
    }
    headings = {
        DifferenceGroup.OWN: "each farm's own",
        DifferenceGroup.DIFFERS: "differs",
        DifferenceGroup.CLASH: "the same, and must not be",
    }
    blocks = []
    for group, words in headings.items():
        some = [one for one in found if one.group is group]
        if some:
            blocks.append(f"{words} ({len(some)})\n{_table(some)}")
    text = "\n\n".join(blocks) or "nothing differs"
    if not bad:
        text += "\n\nin step: nothing differs but what is each farm's own" if blocks else ""
    if not (check and bad):
        return TaskResult(data, text)
    problem = f"{first.farm.farm} and {second.farm.farm} are not in step: {len(bad)} "
    return TaskResult(data, text, ok=False, problem=problem + ("places" if len(bad) > 1 else "place"))


@command()
def farms(_run: TaskRun) -> TaskResult:
    """Show all farms of this machine, their files and VMs."""
    from dataclasses import asdict

    from provision.farms import seen_farms

    seen = seen_farms()
    data = {
        "farms": [{**asdict(one), "state": str(one.state)} for one in seen.farms],
        "closed": [{"place": str(place), "user": user} for place, user in seen.closed.items()],
        "free": seen.free,
    }
    rows = [
        (
            one.farm,
            f"{one.file} ({one.file_state})" if one.file_state not in ("", "there") else one.file,
            ", ".join(f"{vm.vm} {vm.state}" for vm in one.vms) or "none",
            "unknown" if one.bytes is None else rounded(one.bytes),
            "" if one.ours else one.user,
            str(one.state),
        )
        for one in seen.farms
    ]
    lines: list[Text] = []
    if rows:
        headings = ("FARM", "FILE", "VMS", "SPACE", "OF", "STATE")
        lines += [views.table(headings, rows), ""]
    lines += [f"{one.farm}: {one_line(one.note)}" for one in seen.farms if one.note]
    lines += [
        f"{user}'s farms in {one_line(str(place))} can't be looked at"
        for place, user in seen.closed.items()
    ]
    if not rows:
        lines.append("no farm was made on this machine, as far as can be seen: clone-farm makes one")
    if seen.free is not None:
        lines.append(f"free where the state is: {rounded(seen.free)}")
    return TaskResult(data, joined(lines, "\n"))


def _twin_view(made: Twin, *, planned: bool) -> TaskResult:
    data: Mapping[str, object] = {
        "farm": made.farm,
        "file": str(made.file),
        "of": str(made.of),
        "planned": planned,
        "own": [_as_data(one) for one in made.own],
        "notes": made.notes,
        "text": made.text,
    }
    lines: list[Text] = [made.text] if planned else [f"{made.file} written"]
    lines += ["", f"its own ({len(made.own)})", _table(made.own)]
    if made.notes:
        lines += ["", "see to:", *(f"  {note}" for note in made.notes)]
    if not planned:
        file = str(made.file)
        later = (Call("clone-farm", farm=file), "; what differs later: ")
        lines += ["", ("go on with ", *later, Call("farm-diff", with_=file))]
    return TaskResult(data, joined(lines, "\n"))


def _table(found: Sequence[FarmDifference]) -> str:
    rows = []
    for one in found:
        sides = (one.first, one.second)
        values = _cut(one.first.value or "-", one.second.value or "-")
        places = (f"{Path(side.file).name}:{side.line}" for side in sides)
        rows.append((one.what, *values, *places))
    return views.table(("WHAT", "FIRST", "SECOND", "FIRST IN", "SECOND IN"), rows)


def _cut(one: str, other: str) -> tuple[str, str]:
    """Both from shortly before where they part, if that is far from their beginning."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = same - _BEFORE if max(len(one), len(other)) > _SHOWN and same > _BEFORE else 0
    first, second = (one_line(f"{'…' * bool(begin)}{text[begin:]}", _SHOWN) for text in (one, other))
    return first, second


def _as_data(one: FarmDifference) -> Mapping[str, object]:
    sides = {"first": one.first, "second": one.second}
    return {
        "what": one.what,
        **{
            name: {"value": side.value, "file": side.file, "line": side.line}
            for name, side in sides.items()
        },
    }


# ---- Flags


def _read(option: str, text: str, how: Callable[[str], T]) -> T:
    try:
        return how(text.strip())
    except ValueError as error:
        raise UsageError(f"{option}: {error}", remedy=f"give another {option}") from None


def _subnet(text: str) -> IPv4Network:
    found: Any = to_subnet(text)
    return IPv4Network(found)


def _number(text: str) -> int:
    found: Any = to_int(text.removeprefix("-"))
    return -int(found) if text.startswith("-") else int(found)


def _endpoint(text: str) -> TwinEndpoint:
    from provision.twins.asked import TwinEndpoint

    address, colon, port = text.partition(":")
    number = _number(port) if colon else None
    if number is not None and not 0 < number < 65536:
        raise ValueError(f"{port[:20]!r} is not a port from 1 to 65535")
    found: Any = to_address(address)
    return TwinEndpoint(IPv4Address(found), number)


def _by_vm(option: str, given: FlagValues, how: Callable[[str], T]) -> dict[str, T]:
    found = {}
    for word in given or ():
        vm, equals, value = word.partition("=")
        if not (vm and equals and value):
            raise UsageError(f"{option}: {word[:60]!r} names no VM", remedy=f"{option} VM=…")
        found[vm.strip()] = _read(option, value, how)
    return found
