"""The VMs of the operation under way, side by side: a thread for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING

from inventory.errors import Call, FarmhandError, Interrupted, Several

if TYPE_CHECKING:
    from provision.site import Site

_AT_ONCE = 16  # threads: each mostly waits for a daemon or a guest


def side_by_side(site: Site, tasks: Mapping[str, Callable[[], object]]) -> None:
    """Run each VM's task in a thread of its own, in this thread's context. All run to their end; then
    the error of a task that failed is raised, or Several. At Ctrl-C each stops before its next step,
    then Interrupted is raised."""
    if len(tasks) == 1:
        for vm, task in tasks.items():
            _of(vm, task)
        return
    if not tasks:
        return
    from concurrent.futures import Future, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(min(len(tasks), _AT_ONCE), thread_name_prefix="vm") as pool:
        futures: dict[str, Future[None]] = {
            vm: pool.submit(copy_context().run, _of, vm, task) for vm, task in tasks.items()
        }
        try:
            wait(futures.values())
        except KeyboardInterrupt:
            site.journal.interrupted.set()
            for future in futures.values():
                future.cancel()
            wait(futures.values())
            raise Interrupted(
                "interrupted; each VM stopped before its next step",
                remedy=(
                    "the same command goes on from there; ",
                    Call("recover"),
                    " puts things right first",
                ),
            ) from None
    errors: dict[str, FarmhandError] = {}
    for vm, future in futures.items():
        error = future.exception()
        if error is None:
            continue
        if not isinstance(error, FarmhandError):
            raise error
        errors[vm] = error
    if len(errors) > 1:
        raise Several(errors)
    for error in errors.values():
        raise error


def _of(vm: str, task: Callable[[], object]) -> None:
    """Run the task; an error of it that names no VM gets this one."""
    try:
        task()
    except FarmhandError as error:
        error.vm = error.vm or vm
        raise
