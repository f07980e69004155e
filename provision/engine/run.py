"""One operation under way, and how its plan is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Stages
from provision.engine.report import Action

if TYPE_CHECKING:
    from provision.site import Site


class Run:
    """One operation under way: its VMs, and what it does."""

    def __init__(self, site: Site, name: str, vms: tuple[str, ...] = ()) -> None:
        self.site = site
        self.name = name
        self.vms = vms
        self.actions: list[Action] = []

    def add(self, *actions: Action) -> None:
        self.actions += actions

    def carry_out(self, stages: Stages) -> None:
        """Carry a plan out, stage by stage; under ``--plan`` nothing is done. The run's lines are
        those of all jobs, in the plan's order. A job that did something else than announced gives its
        own lines."""
        jobs = [job for stage in stages for chain in stage.values() for job in chain]
        done = {id(job): job.actions for job in jobs}
        for stage in () if self.site.plan else stages:
            self._stage(stage, done)
        self.add(*(action for job in jobs for action in done[id(job)]))

    def _stage(self, stage: Mapping[str, Sequence[Job]], done: dict[int, tuple[Action, ...]]) -> None:
        for job in (job for chain in stage.values() for job in chain if job.run is None):
            for action in job.actions:
                self.site.reporter.say(action.text, vm=action.vm)

        def one(chain: Sequence[Job]) -> None:
            for job in chain:
                instead = job.run() if job.run is not None else None
                if instead is not None:
                    done[id(job)] = tuple(instead)

        tasks = {vm: partial(one, chain) for vm, chain in stage.items() if any(job.run for job in chain)}
        side_by_side(self.site, tasks)
