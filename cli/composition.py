"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``,
``provision.engine.registry``)."""

from __future__ import annotations

import builds
from hypervisors.drivers import DRIVERS, PARTS
from inventory import kinds
from provision import operations
from provision.engine import registry
from provision.events import SUBSCRIBERS

kinds.hosts.update(DRIVERS)
kinds.subscribers.update(SUBSCRIBERS)
kinds.parts.update(PARTS)
registry.register(operations.OPERATIONS, operations.ACTIVITIES)
registry.register({}, builds.ACTIVITIES)
