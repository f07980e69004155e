"""What ``doctor`` says: a report of checks, as data and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import wrap

from host.check import Check
from inventory.errors import Text, spelled


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All checks. ``ok``: nothing that is needed is broken."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok or check.level == "note" for check in self.checks)

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks of what is needed and broken."""
        return tuple(check for check in self.checks if not check.ok and check.level == "needed")

    def as_dict(self) -> Mapping[str, object]:
        return {"healthy": self.ok, "checks": [check.as_dict() for check in self.checks]}

    def text(self, columns: int = 10_000, how: Callable[[Text], str] = spelled) -> str:
        """The report as text, wrapped to ``columns``. Remedies stand below what they are for. ``how``:
        words them."""
        width = max(len(check.name) for check in self.checks)
        indent = " " * (width + 8)
        lines = []
        for check in self.checks:
            mark = "ok" if check.ok else "note" if check.level == "note" else "FAIL"
            head = f"{mark:<4}  {check.name:<{width}}  "
            texts = [(head, check.text)]
            if check.remedy and not check.ok:
                texts.append((indent, how(check.remedy)))
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
