"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``)."""

from __future__ import annotations

from builds.steps import STEPS
from hypervisors.drivers import DRIVERS, PARTS
from inventory import kinds

kinds.hosts.update(DRIVERS)
kinds.parts.update(PARTS)
kinds.steps.update(STEPS)
