"""recover: what killed commands left, finished or undone at once; see engine/recovery.py."""

from __future__ import annotations

from provision.engine.recovery import recover_all
from provision.engine.report import Action, NoResult, Outcome
from provision.operations.destroy import DESTROY, last_of
from provision.site import Site


def recover(site: Site) -> Outcome[NoResult]:
    """Finish or undo all that was left. Every operation does so first, and warns of errors; here, where
    it is all that was asked for, errors are raised."""
    if not site.plan and site.paths.root.exists():
        site.prepare()
    left = [record for record in site.journal.unfinished() if record.verb == DESTROY.name]
    razed = any(DESTROY.facts_of(record).whole for record in left)
    actions = recover_all(site, strict=True)
    if razed and not site.plan:
        last_of(site)
    if not actions:
        actions = (Action("keep", "", "nothing was left unfinished"),)
    return Outcome("recover", site.plan, actions, NoResult())
