"""What there is of each kind, put together: here alone is it known which rooms have tables of kinds."""

from __future__ import annotations

from builds.steps import KINDS
from inventory import kinds


def compose() -> None:
    """Once, before a farm file is read."""
    kinds.STEPS.register(KINDS)
