"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``)."""

from __future__ import annotations

from hypervisors.drivers import DRIVERS, PARTS
from inventory import kinds
from provision.events import SUBSCRIBERS

kinds.hosts.update(DRIVERS)
kinds.subscribers.update(SUBSCRIBERS)
kinds.parts.update(PARTS)
