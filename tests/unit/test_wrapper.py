"""./invoke: from anywhere, through links, and what it says when it can't set things up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "invoke", "cli/__init__.py", "cli/program.py", "cli/start.py", "cli/streams.py", "cli/task_words.py",
    "cli/typed_words.py", "host/__init__.py", "host/program.py", "inventory/__init__.py",
    "inventory/endings.py", "inventory/errors.py",
    "host/printable.py",
    "requirements.lock", "packages.txt",
)  # fmt: skip


def checkout(directory: Path) -> Path:
    """What the wrapper itself needs of a checkout, under a name with a space, and one task."""
    place = directory / "check out"
    place.mkdir()
    for name in PARTS:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    task = "from invoke import task\n\n\n@task\ndef hello(c):\n    print('hello')\n"
    (place / "tasks.py").write_text(task)
    return place


def run(*argv: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(a) for a in argv],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, **more,
    )  # fmt: skip


def ready_cache(directory: Path, place: Path) -> Path:
    """A cache that looks complete: an environment with the interpreter that runs the tests."""
    import hashlib
    import sys

    cache = directory / "ca che"

    def stamp(name: str) -> str:
        return hashlib.sha256((place / name).read_bytes()).hexdigest()[:12]

    venv = cache / f"venv-{stamp('requirements.lock')}"
    version = Path(os.path.realpath("/usr/bin/python3")).name
    packages = venv / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "libvirt.py").touch()
    (venv / "bin").mkdir()
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (venv / "ready").write_text(version + "\n")
    (cache / f"packages-{stamp('packages.txt')}.ready").touch()
    return cache


def test_from_anywhere_through_links_and_spaces(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    environment = {**os.environ, "FARMHAND_CACHE_DIR": str(ready_cache(tmp_path, place))}
    absolute, relative = tmp_path / "absolute", tmp_path / "rela tive"
    absolute.symlink_to(place / "invoke")
    relative.symlink_to("absolute")
    for path in (place / "invoke", absolute, relative):
        done = run(path, "hello", cwd="/", env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", ""), path
    done = run("./invoke", "hello", cwd=place, env=environment)
    assert done.stdout == "hello\n"


def test_closed_standard_streams_are_no_others(tmp_path: Path) -> None:
    """A file that is opened does not get the number of a closed one, and what is printed with it."""
    place = checkout(tmp_path)
    with (place / "tasks.py").open("a") as file:
        file.write(
            "\n\n@task\ndef streams(c):\n    import os\n    with open('seen', 'w') as seen:\n"
            "        seen.write(' '.join(os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)))\n"
        )
    environment = {**os.environ, "FARMHAND_CACHE_DIR": str(ready_cache(tmp_path, place))}
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    done = run(*shell, place / "invoke", "streams", cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == "/dev/null /dev/null /dev/null"


def test_modules_in_the_current_directory_are_not_ours(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    environment = {**os.environ, "FARMHAND_CACHE_DIR": str(ready_cache(tmp_path, place))}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('the wrong json')\n")
    assert run(place / "invoke", "hello", cwd=elsewhere, env=environment).stdout == "hello\n"


def test_without_root_the_administrators_command_is_one_line(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    with (place / "packages.txt").open("a") as file:
        file.write("farmhand-no-such-package\n")
    tmp_path.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    for directory in tmp_path.parents:
        if directory != Path("/tmp") and directory.is_relative_to("/tmp") and os.geteuid() == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = run(
        *drop, place / "invoke", "hello",
        env={"PATH": os.environ["PATH"], "HOME": str(home), "FARMHAND_CACHE_DIR": str(home / "cache")},
    )  # fmt: skip
    assert done.returncode == 69
    assert done.stdout == ""
    *_, command = done.stderr.splitlines()
    assert command.startswith("apt-get install -y --no-install-recommends ")
    assert command.endswith("farmhand-no-such-package")


def test_the_locks_are_hashed_and_name_no_index() -> None:
    for name in ("requirements.lock", "tests/dev/requirements-dev.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "--find-links" not in text and "index-url" not in text
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
        assert pins
        assert text.count("--hash=sha256:") >= len(pins)


def test_an_incomplete_checkout_is_named(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    (place / "requirements.lock").unlink()
    done = run(place / "invoke", "hello")
    assert done.returncode == 69
    assert f"farmhand: the checkout at {place} is not complete" in done.stderr


def test_what_the_tests_need_is_looked_for_where_they_are_wanted(tmp_path: Path) -> None:
    """A checkout may be without tests/."""
    place = checkout(tmp_path)
    environment = {**os.environ, "FARMHAND_CACHE_DIR": str(ready_cache(tmp_path, place))}
    assert run(place / "invoke", "hello", env=environment).stdout == "hello\n"
    done = run(place / "invoke", "test", env=environment)
    assert done.returncode == 69
    assert f"farmhand: the checkout at {place} is not complete" in done.stderr


def test_whatever_the_umask_what_is_made_is_for_others_to_read_at_most(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    body = "print(open('/proc/self/status').read())"
    task = f"from invoke import task\n\n\n@task\ndef hello(c):\n    {body}\n"
    (place / "tasks.py").write_text(task)
    env = {**os.environ, "FARMHAND_CACHE_DIR": str(ready_cache(tmp_path, place))}
    for umask in (0o000, 0o077):
        assert "\nUmask:\t0022\n" in run(place / "invoke", "hello", env=env, umask=umask).stdout


def test_a_directory_that_python_can_not_use_is_refused_beforehand(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    for name in ("a:b", "a\nb"):
        env = {**os.environ, "FARMHAND_CACHE_DIR": str(tmp_path / name)}
        done = run(place / "invoke", "hello", env=env)
        assert done.returncode == 69 and done.stdout == ""
        assert "set FARMHAND_CACHE_DIR to one without" in done.stderr.splitlines()[-1]
        assert not (tmp_path / name).exists()


def test_the_hint_follows_from_what_pip_said(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    (place / "packages.txt").write_text("bash\n")
    lock = "requirements.lock"
    (place / lock).write_text(f"no-such-thing==1 --hash=sha256:{'0' * 64}\n")
    env = {
        **os.environ, "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "1", "PIP_NO_CACHE_DIR": "1",
        "FARMHAND_CACHE_DIR": str(tmp_path / "c d"), "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = run(place / "invoke", "hello", env=env, umask=0o077)
    assert done.returncode == 69, done.stderr
    assert "the Python packages could not be installed" in done.stderr
    hint = "  look at the network, proxies, and pip's settings (pip config list)"
    assert done.stderr.splitlines()[-1] == hint
    assert (tmp_path / "c d").stat().st_mode & 0o777 == 0o755


def test_nothing_is_set_up_for_who_types(tmp_path: Path) -> None:
    place = checkout(tmp_path)
    cache = tmp_path / "cache"
    env = {**os.environ, "FARMHAND_CACHE_DIR": str(cache)}
    for word in ("hello", "test"):
        done = run(place / "invoke", "--complete", "--", word, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not cache.exists()
