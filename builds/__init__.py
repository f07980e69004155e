"""The build cycle: what is built, in which steps, and what is kept of it."""

OPERATIONS = {
    "build": "builds.packages.operation:BuildPackages",
    "clean": "builds.clean:Clean",
    "cycle": "builds.operation:RunCycle",
    "rebuild": "builds.packages.rebuild:Rebuild",
    "unlock": "builds.unlock:Unlock",
}
"""By name, its class."""

ACTIVITIES = {
    "build": "builds.packages.operation:BUILD_PACKAGES",
    "clean": "builds.clean:CLEANED",
    "cycle": "builds.operation:CYCLE",
    "cycle-lock": "builds.cycle_lock:CYCLE_LOCKED",
    "rebuild": "builds.packages.rebuild:REBUILD",
    "unlock": "builds.unlock:UNLOCK",
}
"""By the name in the journal, what recovers it."""
