"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``)."""

from __future__ import annotations

from hypervisors.drivers import DRIVERS, PARTS
from inventory import kinds
from provision.network.services import SERVICES

kinds.hosts.update(DRIVERS)
kinds.parts.update(PARTS)
kinds.services.update(SERVICES)
