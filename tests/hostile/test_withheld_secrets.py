"""Secrets that are for us alone stay out of the environment of all that we start."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from host.run import Runner
from provision.engine.report import QuietReporter
from provision.site import open_site

ROOT = Path(__file__).parents[2]
FARM = """
farm: kata
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12, size: 64M}}
vms: {prod: {memory: 512M}}
cycle:
  steps:
  - {name: get, fetch: "http://127.0.0.1/x", to: prod, path: x, sha256: "%s", login: ARTIFACTS_LOGIN}
events:
  chat: {webhook: "http://127.0.0.1:9/x", secret_variable: CHAT_HOOK}
""" % ("0" * 64)
SECRETS = ("FARMHAND_TSIG_KEY", "FARMHAND_HOOK_SECRET", "ARTIFACTS_LOGIN", "CHAT_HOOK")
WANTED = ("PATH", "HOME", "SSH_AUTH_SOCK", "https_proxy", "FARMHAND_STATE_DIR", "MY_TOOL_TOKEN")
REPLACED = """
import sys
from cli.run import TaskRun
from cli.terminal import replace_process
replace_process(TaskRun("ssh", "", json=False, plan=False), ["env"])
"""


def names(text: str) -> set[str]:
    return {line.partition("=")[0] for line in text.splitlines()}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    for name in (*SECRETS, *WANTED[2:4], WANTED[-1]):
        monkeypatch.setenv(name, "very secret, or wanted")
    file = tmp_path / "kata.yaml"
    file.write_text(FARM)
    with open_site(file, reporter=QuietReporter()) as site:
        return site.runner


def test_no_way_to_start_a_program_hands_our_secrets_down(runner: Runner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    runner.change("env", log=log)
    told = [runner.read("env").stdout, log.read_text()]
    with runner.talk("env") as process:
        told.append(process.communicate()[0].decode())

    async def served() -> str:
        return (await (await runner.serve("env")).communicate())[0].decode()

    told.append(asyncio.run(served()))
    for text in told:
        assert names(text) >= set(WANTED), "what commands of the admin's own rely on"
        assert names(text).isdisjoint(SECRETS)
    assert set(SECRETS) <= set(os.environ), "we have them ourselves"


def test_what_takes_our_place_on_the_terminal_has_no_secret_either() -> None:
    environment = {**os.environ, "FARMHAND_TSIG_KEY": "secret", "SSH_AUTH_SOCK": "/agent"}
    done = subprocess.run(
        [sys.executable, "-c", REPLACED], cwd=ROOT, env=environment, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "SSH_AUTH_SOCK" in names(done.stdout)
    assert "FARMHAND_TSIG_KEY" not in names(done.stdout)
