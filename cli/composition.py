"""What there is, put together: the rooms' own tables, so that none below has to know another."""

from __future__ import annotations

import builds
from provision import operations
from provision.engine import registry

registry.register(operations.OPERATIONS, operations.ACTIVITIES)
registry.register({}, builds.ACTIVITIES)
