"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``)."""

from __future__ import annotations

from builds.steps import STEPS
from inventory import kinds

kinds.steps.update(STEPS)
