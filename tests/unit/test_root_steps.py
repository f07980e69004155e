"""Steps that need root, where the login is another: by sudo, or refused before anything is done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cycle_farm import Lab, reset, run, run_cycle
from cycle_farm import environment as places
from sshd_machine import gone, wait_for

from builds.debugging import FailedPlace
from builds.operation import RunCycle
from builds.plan import check_root
from builds.steps.run import RunStep
from inventory.errors import BuildFailed, Unsupported
from inventory.loader import load, loads
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.guest.connection import Connection
from provision.site import Site

# What an account without rights finds, and the sudo that it has: none of it is the machine's own.
ID = "#!/bin/sh\necho 1000\n"
SUDO = """#!/bin/sh
printf '%s\\n' "$*" >>"$ROOM/asked"
[ -e "$ROOM/may" ] || exit 1
shift
[ "$1" = -- ] && shift
exec "$@"
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """dev2's login is builder, who is not root."""
    for name, value in places(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"id": ID, "sudo": SUDO}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    settings = {"PATH": f"{tools}:/usr/bin:/bin", "ROOM": str(tools)}
    made = Lab(tmp_path, dev2={"shell": "/bin/bash", "environment": settings})
    with (made.dev2.root / "passwd").open("a") as passwd:
        passwd.write(f"builder:*:{os.getuid()}:{os.getgid()}::{made.dev2.home}:/bin/bash\n")
    yield made
    made.stop()


def site_of(lab: Lab, *steps: dict) -> Site:
    file = lab.farm_file(list(steps))
    farm = json.loads(file.read_text())
    farm["ssh"]["user"] = "builder"
    file.write_text(json.dumps(farm))
    return Site(load(file), reporter=lab.told)


WHO = run("who", 'echo "by $0"; echo "$HOME"; pwd', root="yes")


def test_a_login_that_can_not_be_root_is_refused_before_anything_is_done(lab: Lab) -> None:
    (lab.dev2.home / "kept").touch()
    with (
        site_of(lab, reset("dev2"), run("first", "true"), WHO) as site,
        pytest.raises(Unsupported, match="step who needs root on dev2, and builder can't be it there"),
    ):
        run_cycle(site)
    assert (lab.dev2.home / "kept").exists(), "it was not even reset"


def test_it_runs_by_sudo_in_the_logins_home(lab: Lab) -> None:
    (lab.root / "tools" / "may").touch()
    with site_of(lab, reset("dev2"), WHO) as site:
        record = run_cycle(site)
    (step,) = (step for step in record.steps if step.name == "who")
    log = (record.directory / step.log).read_text()
    assert f"{lab.dev2.home}\n{lab.dev2.home}\n" in log
    asked = (lab.root / "tools" / "asked").read_text()
    assert f"-n -- env HOME={lab.dev2.home} sh -c" in asked
    assert "pwd" not in asked, "sudo logs its arguments: the script isn't there"
    with site_of(lab, reset("dev2"), run("plain", "true")) as site:
        (lab.root / "tools" / "asked").unlink()
        run_cycle(site)
    assert not (lab.root / "tools" / "asked").exists(), "nobody asks where no step needs it"


def test_where_it_failed_is_looked_into_as_root(lab: Lab) -> None:
    (lab.root / "tools" / "may").touch()
    places: list[FailedPlace] = []

    async def look_into(place: FailedPlace) -> None:
        places.append(place)

    step = run("broken", "mkdir made; cd made; false", root="yes")
    with site_of(lab, reset("dev2"), step) as site, pytest.raises(BuildFailed):
        perform(site, RunCycle(debugger=look_into))
    (place,) = places
    (lab.root / "tools" / "asked").unlink()
    done = subprocess.run(
        ["ssh", *place.argv[2:]], input='echo "<$PWD>"\n', capture_output=True, text=True, check=False
    )
    assert f"<{lab.dev2.home}/made>" in done.stdout, done.stderr
    assert f"-n -- env HOME={lab.dev2.home} sh -c" in (lab.root / "tools" / "asked").read_text()


def test_what_runs_as_root_is_ended_too(lab: Lab) -> None:
    (lab.root / "tools" / "may").touch()
    there = lab.dev2.home / "pid"

    async def go() -> None:
        async with await Connection.open(lab.dev2.endpoint(user="builder")) as connection:
            script = 'echo $$ >"$HOME/pid"; sleep 600'
            done = await connection.run(script, timeout=2, log=lambda _: None, root=True)
            assert done.timed_out

    asyncio.run(go())
    wait_for(there.exists)
    assert gone(int(there.read_text()))


def test_what_the_farm_file_itself_tells_is_refused_without_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path))
    step = RunStep(name="install", vm="dev2", run=("dpkg -i x.deb",), root=True)

    def look(ssh: str, template: str = "build: debian-12") -> None:
        text = f"farm: kata\nssh: {{{ssh}}}\ntemplates: {{base: {{{template}}}}}\nvms: {{dev2: {{}}}}\n"
        with Site(loads(text.encode(), tmp_path / "f.yaml"), reporter=QuietReporter()) as site:
            check_root(site, [step], "dev2")

    with pytest.raises(Unsupported, match="step install needs root on dev2"):
        look("user: builder")
    look("user: root")
    look("user: builder, sudo: builder")
    look("user: debian", "import: debian.qcow2")  # its image may give it sudo


def test_root_itself_needs_no_sudo(lab: Lab) -> None:
    parts: list[bytes] = []

    async def go() -> None:
        async with await Connection.open(lab.prod.endpoint()) as connection:
            assert await connection.may_be_root() == (os.getuid() == 0)
            if os.getuid() == 0:
                script = "read -r line || echo closed; cat; printf 'x y\\n'"
                await connection.run(script, timeout=30, log=parts.append, root=True)

    asyncio.run(go())
    assert os.getuid() != 0 or b"".join(parts) == b"closed\nx y\n"
