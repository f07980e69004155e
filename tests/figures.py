"""What a benchmark found, as a table or as data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from inventory.sizes import format_size


@dataclass(frozen=True, slots=True)
class Figure:
    """``values`` of each round: seconds, bytes or calls. ``limit``: what it must stay under, in the same
    or, where ``beside`` names another figure, as a multiple of that one. None: nothing is asked."""

    name: str
    values: tuple[float, ...]
    limit: float | None = None
    beside: str = ""
    unit: str = "s"  # or "B", "calls"

    @property
    def median(self) -> float:
        return median(self.values)

    def show(self, value: float) -> str:
        match self.unit:
            case "s":
                return f"{value * 1000:.0f} ms"
            case "B":
                return format_size(int(value))
        return f"{value:g}"


@dataclass(frozen=True, slots=True)
class Figures:
    figures: tuple[Figure, ...]

    def value(self, figure: Figure) -> float:
        """The ratio where there is something to compare with, else seconds or bytes."""
        if figure.beside:
            other = next(f for f in self.figures if f.name == figure.beside)
            return figure.median / other.median
        return figure.median

    def within(self, figure: Figure) -> bool:
        return figure.limit is None or self.value(figure) <= figure.limit

    @property
    def all_within(self) -> bool:
        return all(self.within(f) for f in self.figures)

    def as_dict(self) -> Mapping[str, object]:
        return {
            "within": self.all_within,
            "figures": [
                {
                    "name": f.name,
                    "median": round(f.median, 4),
                    "least": round(min(f.values), 4),
                    "unit": f.unit,
                    "rounds": len(f.values),
                    "ratio": round(self.value(f), 2) if f.beside else None,
                    "beside": f.beside or None,
                    "limit": f.limit,
                    "within": self.within(f),
                    "values": [round(value, 4) for value in f.values],
                }
                for f in self.figures
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figures:
        return cls(
            tuple(
                Figure(f["name"], tuple(f["values"]), f["limit"], f["beside"] or "", f["unit"])
                for f in data["figures"]
            )
        )

    def text(self) -> str:
        rows = [("FIGURE", "MEDIAN", "LEAST", "RATIO", "LIMIT", "")]
        for f in self.figures:
            limit = "" if f.limit is None else f"{f.limit:g}x" if f.beside else f.show(f.limit)
            verdict = "" if f.limit is None else "ok" if self.within(f) else "OVER"
            ratio = f"{self.value(f):.2f}x" if f.beside else ""
            rows.append((f.name, f.show(f.median), f.show(min(f.values)), ratio, limit, verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join(
            "  ".join(
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started
