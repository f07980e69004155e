"""What ``doctor`` says: a report of checks, as data and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from textwrap import wrap

from host.check import Check


@dataclass(frozen=True, slots=True)
class Report:
    """All checks. ``ok``: nothing that is needed is broken."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok or check.level == "note" for check in self.checks)

    @property
    def problems(self) -> tuple[Check, ...]:
        """What is needed and broken."""
        return tuple(check for check in self.checks if not check.ok and check.level == "needed")

    def worded(self, change: Callable[[str], str]) -> Report:
        """The same with each remedy changed: as the face that shows it wants commands typed."""
        return Report(tuple(replace(check, remedy=change(check.remedy)) for check in self.checks))

    def as_dict(self) -> Mapping[str, object]:
        return {"healthy": self.ok, "checks": [check.as_dict() for check in self.checks]}

    def text(self, columns: int = 10_000) -> str:
        """Wrapped to ``columns``, remedies below what they are for."""
        width = max(len(check.name) for check in self.checks)
        indent = " " * (width + 8)
        lines = []
        for check in self.checks:
            mark = "ok" if check.ok else "note" if check.level == "note" else "FAIL"
            head = f"{mark:<4}  {check.name:<{width}}  "
            texts = [(head, check.text)]
            if check.remedy and not check.ok:
                texts.append((indent, check.remedy))
            for first, text in texts:
                lines += wrap(
                    text,
                    max(columns, width + 30),
                    initial_indent=first,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        broken = len(self.problems)
        lines.append("" if broken else "everything that is needed is there")
        if broken:
            lines[-1] = f"{broken} {'thing is' if broken == 1 else 'things are'} broken: see FAIL above"
        return "\n".join(lines)
