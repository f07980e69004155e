"""Which of several fails: a batch is halved until one is named, that without which it passes.

All that is known is *verdicts*: such parts of the batch, on top of the base, pass or fail. The batch
stands in an order, and its beginnings are tried: none of it passes, all of it fails, so somewhere a
beginning passes that fails with the next one. That one is found in ``ceil(log2 n)`` runs, whatever
else is the matter, and is named: with it the batch fails, without it it passes. Then one more run tries
it alone. If it passes so, it fails only *together* with some before it, and these are found in the same
way: each costs at most ``1 + ceil(log2 n)`` runs more."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """How far it is, as a value. ``units``: what may still be named, in their order. ``passing``: so
    many of them, the first ones, pass together with ``named``; -1: not even none of them is known to.
    ``failing``: so many fail with it."""

    units: tuple[str, ...]
    passing: int
    failing: int
    named: tuple[str, ...] = ()

    @classmethod
    def of(cls, units: tuple[str, ...]) -> Bisection:
        """For a batch that failed, on a base that passes."""
        assert units
        return _settled(cls(units=units, passing=0, failing=len(units)))

    @property
    def done(self) -> bool:
        """Whether ``named`` are all: alone, they fail, and each of them is needed for that."""
        return self.failing == 0

    @property
    def trial(self) -> tuple[str, ...]:
        """What is to be tried next, nothing if it is done."""
        if self.done:
            return ()
        return (*self.units[: self._middle], *self.named)

    @property
    def most(self) -> int:
        """Runs, at most, until it has named another one, or is done."""
        between = self.failing - max(self.passing, 0)
        return 0 if self.done else max(between - 1, 0).bit_length() + (self.passing < 0)

    @property
    def _middle(self) -> int:
        return 0 if self.passing < 0 else (self.passing + self.failing) // 2

    def judged(self, *, passed: bool) -> Bisection:
        """With the verdict of ``trial``."""
        assert not self.done
        middle = self._middle
        return _settled(
            replace(self, passing=middle) if passed else replace(self, failing=middle)
        )  # fmt: skip


def _settled(known: Bisection) -> Bisection:
    """Where a beginning passes that fails with the next unit, that one is named."""
    if known.failing - max(known.passing, 0) != 1 or known.passing < 0:
        return known
    named = (known.units[known.passing], *known.named)
    # What comes before it is in doubt now; without any of that it was tried where there is none.
    return Bisection(
        units=known.units[: known.passing],
        passing=-1,
        failing=known.passing,
        named=named,
    )
