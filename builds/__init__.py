"""The build cycle: what is built, in which steps, and what is kept of it."""

OPERATIONS = {"cycle": "builds.operation:RunCycle"}
"""By name, its class."""

ACTIVITIES = {"cycle": "builds.operation:CYCLE"}
"""By the name in the journal, what recovers it."""
