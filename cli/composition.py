"""What there is of each kind, put into the tables that the lower rooms read (``inventory.kinds``,
``provision.engine.registry``)."""

from __future__ import annotations

import builds
from builds.steps import STEPS
from hypervisors.drivers import DRIVERS, PARTS
from inventory import kinds
from provision import operations
from provision.engine import registry
from provision.events import SUBSCRIBERS
from provision.network.services import SERVICES

kinds.hosts.update(DRIVERS)
kinds.subscribers.update(SUBSCRIBERS)
kinds.parts.update(PARTS)
kinds.services.update(SERVICES)
kinds.steps.update(STEPS)
registry.register(operations.OPERATIONS, operations.ACTIVITIES)
registry.register(builds.OPERATIONS, builds.ACTIVITIES)
