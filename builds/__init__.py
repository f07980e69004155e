"""The build cycle: what is built, in which steps, and what is kept of it."""

OPERATIONS = {"cycle": "builds.operation:RunCycle", "unlock": "builds.unlock:Unlock"}
"""By name, its class."""

ACTIVITIES = {"cycle": "builds.operation:CYCLE", "cycle-lock": "builds.cycle_lock:CYCLE_LOCKED"}
"""By the name in the journal, what recovers it."""
