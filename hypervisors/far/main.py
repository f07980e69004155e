"""What ``hypervisors.far`` runs on another machine: its agent, at home where farmhand is at home."""

from __future__ import annotations

from host.paths import FarmPaths, cache_dir, check_directories, state_dir
from hypervisors.api import Directories
from hypervisors.far import agent
from hypervisors.far.agent import Home


def home(farm: str) -> Home:
    """The farm's directories on this machine. WrongState where others may write in them."""
    check_directories()
    paths = FarmPaths(farm)
    return Home(
        directories=Directories(
            state=state_dir(), farm=paths.root, cache=cache_dir(), runtime=paths.runtime
        ),
        seeds=paths.seeds,
        consoles=paths.consoles,
    )


def main() -> None:
    agent.main(home)
