"""Sources of all kinds, with real git: what can be built is built, by the default cycle's own fetch,
over the forwarded port and as a carried copy; the rest is refused by name before anything is reset."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest
from cycle_farm import STEPS, Lab, plan_cycle, reset, run, run_cycle
from cycle_farm import lab as cycles
from sshd_machine import Sshd, free_port, make_key, wait_for

from builds.record import find_record
from builds.source import Resolved, archive_sha256, pack, resolve
from builds.steps.checkout import CheckoutStep
from host.run import Runner
from inventory.errors import FarmhandError, NotFound, Unsupported, WrongState
from provision.guest.connection import Connection

__all__ = ["cycles"]

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Runner(changes=True)
FETCH = CheckoutStep(name="fetch", checkout="dev2").scripts[0] + "cd; "
USER = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_COUNT": "4",
        "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Test",
        "GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "test@example.org",
        "GIT_CONFIG_KEY_2": "protocol.file.allow", "GIT_CONFIG_VALUE_2": "always",
        "GIT_CONFIG_KEY_3": "safe.directory", "GIT_CONFIG_VALUE_3": "*"}  # fmt: skip


def git(where: Path, *args: str | Path) -> str:
    env = {**os.environ, **USER}
    done = subprocess.run(
        ["git", "-C", where, *args], check=True, capture_output=True, text=True, env=env
    )
    return done.stdout.strip()


def commit(where: Path, text: str) -> str:
    (where / "file").write_text(text)
    git(where, "add", "-A")
    git(where, "commit", "-qm", text)
    return git(where, "rev-parse", "HEAD")


def repository(path: Path, *init: str) -> Path:
    """Three commits of one file; made once for each way of making it."""
    if init:
        return _made(path, *init)
    shutil.copytree(_usual(), path)
    return path


@cache
def _usual() -> Path:
    scratch = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, scratch)
    return _made(scratch / "kata")


def _made(path: Path, *init: str) -> Path:
    path.mkdir(parents=True)
    git(path, "init", "-q", "-b", "main", *init)
    for text in ("one", "two", "three"):
        commit(path, text)
    return path


def found(path: Path, revision: str = "HEAD", sources: Path = Path("/nonexistent")) -> Resolved:
    return resolve(RUNNER, str(path), revision, base=path.parent, sources=sources)


# -- each kind --------------------------------------------------------------------------------------


def plain(root: Path) -> Path:
    return repository(root / "kata")


def odd_path(root: Path) -> Path:
    return repository(root / "a 100% \"b\" 'c' %20 ü\\ $HOME;x:y")


def bare(root: Path) -> Path:
    plain(root)
    git(root, "clone", "-q", "--bare", "kata", "kata.git")
    return root / "kata.git"


def shallow(root: Path) -> Path:
    plain(root)
    git(root, "clone", "-q", "--depth=2", (root / "kata").as_uri(), "shallow")
    return root / "shallow"


def worktree(root: Path) -> Path:
    git(plain(root), "worktree", "add", "-q", "--detach", "../tree")
    commit(root / "tree", "in the worktree")
    return root / "tree"


def detached(root: Path) -> Path:
    git(plain(root), "checkout", "-q", "--detach")
    commit(root / "kata", "on no branch")
    git(root / "kata", "checkout", "-q", "HEAD~1")
    git(root / "kata", "checkout", "-q", "-")
    return root / "kata"


def on_no_branch(root: Path) -> Path:
    """Neither does HEAD lead to it; asked for as HEAD@{1}."""
    commit(plain(root), "given up")
    git(root / "kata", "reset", "-q", "--hard", "HEAD~1")
    return root / "kata"


def alternates(root: Path) -> Path:
    plain(root)
    git(root, "clone", "-q", "--shared", "kata", "borrows")
    return root / "borrows"


def separate(root: Path) -> Path:
    return repository(root / "kata", f"--separate-git-dir={root}/elsewhere")


def a_submodule(root: Path) -> Path:
    plain(root)
    repository(root / "outer")
    git(root / "outer", "submodule", "--quiet", "add", root / "kata", "inner")
    return root / "outer" / "inner"


def sha256(root: Path) -> Path:
    return repository(root / "kata", "--object-format=sha256")


def includes(root: Path) -> Path:
    (root / "more").write_text("[core]\n\tfsmonitor = false\n")
    git(plain(root), "config", "includeIf.gitdir:/**.path", str(root / "more"))
    return root / "kata"


def complete_partial(root: Path) -> Path:
    git(plain(root), "config", "uploadpack.allowFilter", "true")
    git(root, "clone", "-q", "--filter=blob:none", (root / "kata").as_uri(), "partial")
    git(root / "partial", "fetch", "-q", "--refetch", "--no-filter")
    (root / "kata").rename(root / "gone")
    return root / "partial"


def someone_elses(root: Path) -> Path:
    plain(root)
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "12345:12345", root / "kata"], check=True)
    return root / "kata"


def someone_elses_bare(root: Path) -> Path:
    bare(root)
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "12345:12345", root / "kata.git"], check=True)
    return root / "kata.git"


def packed_and_read_only(root: Path) -> Path:
    git(plain(root), "gc", "-q")
    subprocess.run(["chmod", "-R", "a-w", root / "kata"], check=True)
    return root / "kata"


KINDS = [plain, odd_path, bare, shallow, worktree, detached, on_no_branch, alternates, separate,
         a_submodule, sha256, includes, complete_partial, someone_elses, someone_elses_bare,
         packed_and_read_only]  # fmt: skip


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("machines")
    make_key(root / "key")
    made = [
        Sshd("dev2", root / "forwards", root / "key").prepare().start(),
        Sshd("dev2", root / "not", root / "key", forwarding=False).prepare().start(),
    ]
    yield made
    for machine in made:
        machine.stop()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_repository_can_be_built(machines, tmp_path, kind):
    path = kind(tmp_path)
    revision = "HEAD@{1}" if kind is on_no_branch else "HEAD"
    source = found(path, revision)
    assert source.commit == git(path, "rev-parse", revision)
    assert len(archive_sha256(RUNNER, source)[0]) == 64
    pack(RUNNER, source, tmp_path / "packed.tar")
    check = 'cat "$HOME/src/file"; git -C "$HOME/src" rev-parse HEAD; rm -rf "$HOME/src"'

    async def go() -> list[str]:
        said = []
        for machine in machines:
            parts: list[bytes] = []
            async with await Connection.open(machine.endpoint(), runner=RUNNER) as connection:
                if machine.forwarding:
                    url = await connection.offer_git(source.repository, name=source.name)
                else:
                    await connection.put([tmp_path / "packed.tar"], "carried")
                    await connection.output("cd carried; tar -xf packed.tar")
                    url = f"{machine.home.as_uri()}/carried/{source.name}.git"
                env = {"SOURCE_URL": url, "GIT_REVISION": source.commit}
                if len(source.commit) == 64:
                    env["GIT_DEFAULT_HASH"] = "sha256"
                await connection.run(FETCH + check, env=env, timeout=60, log=parts.append)
                assert not connection.git_said()
                await connection.output("rm -rf carried")
            said.append(b"".join(parts).decode())
        return said

    text = git(path, "show", f"{source.commit}:file")
    for said in asyncio.run(go()):
        assert said.endswith(f"{text}{source.commit}\n"), said


def test_programs_that_a_repository_names_are_not_run(tmp_path, machines):
    path = plain(tmp_path)
    repository(tmp_path / "inner")
    git(path, "submodule", "--quiet", "add", tmp_path / "inner", "inner")
    touch = f"touch {tmp_path}/ran; cat"
    (path / ".gitattributes").write_text("file filter=evil diff=evil\n")
    commit(path, "four")
    for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.smudge", "filter.evil.process",
                "diff.evil.textconv", "uploadpack.packObjectsHook", "core.pager"):  # fmt: skip
        git(path, "config", key, touch)
        git(path / "inner", "config", key, touch)
    (path / "inner/.gitattributes").write_text("file filter=evil diff=evil\n")
    os.utime(path / "inner/file", (1, 1))
    for hook in ("post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc"):
        (path / ".git/hooks" / hook).parent.mkdir(exist_ok=True)
        (path / ".git/hooks" / hook).write_text(f"#!/bin/sh\n{touch}\n")
        (path / ".git/hooks" / hook).chmod(0o755)
    os.utime(path / "file", (1, 1))  # so that a status has to look
    source = found(path)
    archive_sha256(RUNNER, source)
    pack(RUNNER, source, tmp_path / "packed.tar")

    async def go() -> None:
        async with await Connection.open(machines[0].endpoint(), runner=RUNNER) as connection:
            url = await connection.offer_git(source.repository, name=source.name)
            await connection.output(f"git clone -q {url} hooked; rm -rf hooked")

    asyncio.run(go())
    assert not (tmp_path / "ran").exists()


# -- what can't be ----------------------------------------------------------------------------------


def objects_gone(path: Path, what: str) -> None:
    name = git(path, "rev-parse", what)
    (path / ".git/objects" / name[:2] / name[2:]).unlink()


def broken(path: Path, how: str) -> Path:
    inner = path / ".git"
    if how == "no HEAD":
        (inner / "HEAD").unlink()
    elif how == "bad configuration":
        (inner / "config").write_text("[core\n")
    elif how == "an empty branch":
        (inner / "refs/heads/main").write_text("")
    elif how == "no commit":
        objects_gone(path, "HEAD")
    elif how == "no commit before":
        objects_gone(path, "HEAD~1")
    elif how == "no tree":
        objects_gone(path, "HEAD^{tree}")
    elif how == "no file":
        objects_gone(path, "HEAD:file")
    elif how == "an old file":
        objects_gone(path, "HEAD~2:file")
    elif how == "no alternates":
        (inner / "objects/info/alternates").write_text("/nonexistent\n")
        objects_gone(path, "HEAD")
    elif how == "a worktree's repository moved":
        git(path, "worktree", "add", "-q", "../tree")
        path.rename(path.with_name("moved"))
        return path.with_name("tree")
    return path


@pytest.mark.parametrize(
    "how",
    ["no HEAD", "bad configuration", "an empty branch", "no commit", "no commit before", "no tree",
     "no file", "an old file", "no alternates", "a worktree's repository moved"],
)  # fmt: skip
def test_a_broken_repository_is_refused_by_name(tmp_path, how):
    path = broken(plain(tmp_path), how)
    with pytest.raises(WrongState, match=f"the source {path} is a broken git repository: \\w") as caught:
        found(path)
    assert "\n" not in caught.value.message
    assert "fsck" in caught.value.remedy


def test_a_partial_clone_is_told_from_a_broken_one(tmp_path):
    git(plain(tmp_path), "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", "--filter=blob:none", (tmp_path / "kata").as_uri(), "partial")
    with pytest.raises(WrongState, match="partial is a partial clone: 2 of its objects") as caught:
        found(tmp_path / "partial")
    assert "fetch --refetch --no-filter" in caught.value.remedy


def test_a_shallow_repository_says_that_it_ends(tmp_path):
    path = shallow(tmp_path)
    with pytest.raises(NotFound, match="no revision 'HEAD~2'") as caught:
        found(path, "HEAD~2")
    assert "--unshallow" in caught.value.remedy


def test_a_repository_without_a_commit(tmp_path):
    git(tmp_path, "init", "-q", "empty")
    with pytest.raises(NotFound) as caught:
        found(tmp_path / "empty")
    assert "commit something first" in caught.value.remedy


ASK = """
import os, sys
from pathlib import Path
from builds.source import resolve
from host.run import Runner
from inventory.errors import WrongState
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
path = Path(sys.argv[1])
try:
    resolve(Runner(changes=True), str(path), "HEAD", base=path.parent, sources=Path(sys.argv[2]))
except WrongState as error:
    print(error.message)
"""


@pytest.mark.parametrize("closed", [".", "kata", "kata/.git", "kata/file"])
def test_a_source_that_may_not_be_read(closed):
    """By an ordinary user, in a process of its own."""
    with tempfile.TemporaryDirectory() as made:  # pytest's own directories are closed to others
        root = Path(made)
        (root / "sources").mkdir()
        (root / "sources").chmod(0o777)
        path = plain(root)
        if closed == "kata/file":
            shutil.rmtree(path / ".git")
        root.chmod(0o755)
        (root / closed).chmod(0)
        done = subprocess.run(
            [sys.executable, "-P", "-c", ASK, path, root / "sources"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/", check=False,
        )  # fmt: skip
        (root / closed).chmod(0o755)
        name = path / ".git" if closed == "kata/.git" else path
        why = "can't be taken as it is: " if closed == "kata/file" else "can't be read by "
        assert done.stdout.startswith(f"the source {name} {why}"), done.stdout + done.stderr


# -- before anything is reset -----------------------------------------------------------------------


@pytest.fixture
def lab(cycles: Lab) -> Lab:
    (cycles.dev2.home / "not reset").touch()
    return cycles


def refused(lab: Lab, steps: list[dict], ways=(run_cycle, plan_cycle)) -> FarmhandError:
    errors = []
    for go in ways:
        with lab.site(steps) as site, pytest.raises(FarmhandError) as caught:
            go(site)
        errors.append(caught.value)
    assert len({error.message for error in errors}) == 1
    assert (lab.dev2.home / "not reset").exists()
    return errors[0]


def with_submodules(lab: Lab) -> None:
    """One in another, its URL relative, and the commits of both on no branch."""
    repository(lab.root / "deep")
    repository(lab.root / "inner")
    git(lab.root / "inner", "submodule", "--quiet", "add", "../deep", "sub deep")
    commit(lab.root / "inner", "with one in it")
    git(lab.source, "submodule", "--quiet", "add", lab.root / "inner", "vendor/inner")
    git(lab.source, "submodule", "--quiet", "update", "--init", "--recursive")
    for place in ("vendor/inner/sub deep", "vendor/inner", "."):
        commit(lab.source / place, f"changed in {place}")
        git(lab.source / place, "checkout", "-q", "--detach")
    git(lab.source / "vendor/inner", "branch", "-qD", "main")
    for gone in ("inner", "deep"):
        (lab.root / gone).rename(lab.root / f"{gone}.gone")


@pytest.mark.parametrize("forwarding", [True, False], ids=["forwarded", "carried"])
def test_submodules(lab, forwarding):
    if not forwarding:
        lab.dev2.stop()
        config = lab.dev2.root / "config"
        config.write_text(f"AllowTcpForwarding no\n{config.read_text()}")
        lab.dev2.start()
    with_submodules(lab)
    error = refused(lab, STEPS)
    assert isinstance(error, Unsupported)
    assert re.match(rf"\S+farm\.yaml:\d+:\d+: {lab.source} has submodules at ", error.message)
    assert error.message.endswith(": vendor/inner, vendor/inner/sub deep")
    assert "git submodule update --init" in error.remedy
    again = (
        'rm -rf src; git clone -q "$SOURCE_URL" src; cd src; git submodule -q update --init --recursive'
    )
    look = 'cat "src/file" "src/vendor/inner/file" "src/vendor/inner/sub deep/file"'
    with lab.site([reset("dev2"), run("fetch", [FETCH, FETCH, look, again, look])]) as site:
        record = run_cycle(site)
    log = (record.directory / record.steps[1].log).read_text()
    changed = "changed in .changed in vendor/innerchanged in vendor/inner/sub deep"
    assert log.count(changed) == 2
    assert not record.notes or not forwarding


def test_submodules_that_are_not_here(lab):
    with_submodules(lab)
    git(lab.root, "clone", "-q", "--bare", lab.source, "kata.git")
    lab.source.rename(lab.root / "away")
    (lab.root / "kata.git").rename(lab.source)
    with lab.site([reset("dev2"), run("fetch", "true # git submodule update")]) as site:
        notes = [str(line) for line in plan_cycle(site)]
    assert "submodules not checked out here, the VM has to reach their URLs: vendor/inner" in notes
    assert "vendor/inner" in refused(lab, STEPS).message


def test_files_kept_by_lfs(lab):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    (lab.source / "sub").mkdir()
    (lab.source / "sub/.gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
    (lab.source / "sub/big.bin").write_text(pointer)
    commit(lab.source, "with LFS")
    error = refused(lab, STEPS)
    assert isinstance(error, Unsupported)
    assert f": {lab.source} has files kept by Git LFS at " in error.message
    assert error.message.endswith(": sub/big.bin")
    with lab.site([reset("dev2"), run("fetch", "true # git lfs pull needs a server")]) as site:
        assert run_cycle(site).result == "passed"


def test_a_repository_inside_a_directory_that_is_none(lab):
    repository(lab.source / "part")
    subprocess.run(["rm", "-rf", lab.source / ".git"], check=True)
    error = refused(lab, STEPS, [run_cycle])  # a plan makes no commit of its state
    assert error.message.endswith(": part")


def test_a_url_that_answers_and_has_no_such_branch(lab, tmp_path):
    steps = [reset("dev2"), run("fetch", 'git clone -q "$SOURCE_URL" src')]
    port = free_port()
    serve = ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", f"--base-path={lab.root}",
             "--export-all", "--reuseaddr"]  # fmt: skip
    url = f"git://127.0.0.1:{port}/kata"
    with lab.site(steps, source=url) as site:
        warned = plan_cycle(site, revision="mastr")
        assert any("can't be asked from here, so the VM will be: fatal: " in a.text for a in warned)
    daemon = subprocess.Popen(serve, start_new_session=True)
    try:
        wait_for(lambda: not subprocess.call(["git", "ls-remote", "-q", url], stderr=subprocess.DEVNULL))
        with lab.site(steps, source=url) as site:
            for go in (run_cycle, plan_cycle):
                with pytest.raises(NotFound, match=f": {url} has no branch or tag 'mastr'"):
                    go(site, revision="mastr")
        assert (lab.dev2.home / "not reset").exists()
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait()


def test_a_broken_repository(lab):
    objects_gone(lab.source, "HEAD^{tree}")
    assert "broken git repository" in refused(lab, STEPS).message


def test_why_a_fetch_failed_is_told(lab):
    """The repository breaks while it is being built."""
    steps = [
        run("wait", "touch go; while [ -e go ]; do sleep 0.02; done"),
        run("fetch", STEPS[2]["run"], failure="source"),
    ]
    with lab.site(steps) as site:
        watcher = threading.Thread(target=_break, args=(lab.dev2.home / "go", lab.source / ".git/HEAD"))
        watcher.start()
        with pytest.raises(FarmhandError) as caught:
            run_cycle(site)
        watcher.join()
        record = find_record(site.paths)
    log = (record.directory / record.steps[1].log).read_text()
    why = f"git says here, on this machine: '{lab.source}/.git' does not appear to be a git repository"
    assert why in log
    assert why in caught.value.message


def _break(go: Path, victim: Path) -> None:
    wait_for(go.exists)
    victim.unlink()
    go.unlink()
