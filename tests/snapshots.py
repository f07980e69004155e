"""Snapshots, in a process that runs already: ``snapshots.py REPOSITORY ROUNDS``; a line each with its
seconds. Each is a new generation of channel tested, with the packages of the one before. The farm is
FARMHAND_FARM."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import cli.composition  # noqa: F401 - what there is
from inventory.loader import load
from provision.engine import registry
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.site import Site


def main() -> None:
    name, rounds = sys.argv[1], int(sys.argv[2])
    with Site(load(Path(os.environ["FARMHAND_FARM"])), reporter=QuietReporter()) as site:
        snapshot = registry.operation("repo-rollback")(repo=name, channel="tested")
        perform(site, snapshot)  # what is imported and read once
        for _ in range(rounds):
            began = time.perf_counter()
            perform(site, snapshot)
            print(time.perf_counter() - began)


main()
