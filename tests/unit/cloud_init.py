"""Debian's own cloud-init, as the judge of our seeds: its renderers of the network, its users, its
schema. It is unpacked and nothing of it is installed; kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from host.paths import cache_dir

_PACKAGES = (
    "cloud-init", "python3-attr", "python3-configobj", "python3-jinja2", "python3-json-pointer",
    "python3-jsonpatch", "python3-jsonschema", "python3-markupsafe", "python3-netifaces",
    "python3-oauthlib", "python3-pyrsistent", "python3-requests", "python3-urllib3",
    "python3-chardet", "python3-idna", "python3-certifi", "python3-six", "python3-yaml",
)  # fmt: skip

_JUDGE = """
import json, os, sys, tempfile
root = sys.argv[1]
sys.path.insert(0, f"{root}/usr/lib/python3/dist-packages")
import yaml
from cloudinit import util
from cloudinit.config import schema
from cloudinit.distros import debian, ug_util
from cloudinit.net import eni, netplan, network_state, networkd
util.chownbyname = lambda *_: None  # networkd's account is not everywhere
seed = json.load(sys.stdin)
told = {}
for name, module, settings in (
    ("ifupdown", eni, {"eni_path": "file", "netrules_path": None}),
    ("netplan", netplan, {"netplan_path": "file", "postcmds": False}),
    ("networkd", networkd, {}),
):
    state = network_state.parse_net_config_data(yaml.safe_load(seed["network-config"]))
    with tempfile.TemporaryDirectory() as target:
        module.Renderer(settings).render_network_state(state, target=target)
        files = [os.path.join(at, file) for at, _, names in os.walk(target) for file in names]
        told[name] = "".join(open(file).read() for file in files)
user_data = yaml.safe_load(seed["user-data"])
schema.validate_cloudconfig_schema(user_data, strict=True)
shipped = yaml.safe_load(open(f"{root}/etc/cloud/cloud.cfg"))
distro = debian.Distro("debian", shipped["system_info"], None)
told["users"] = ug_util.normalize_users_groups(user_data, distro)[0]
print(json.dumps(told))
"""


def unpacked() -> Path:
    """Where it is; downloaded the first time: 2 MB."""
    place = cache_dir() / f"test-cloud-init-{hashlib.sha256(repr(_PACKAGES).encode()).hexdigest()[:16]}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        work = Path(name)
        fetch = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *_PACKAGES]
        subprocess.run(fetch, cwd=work, check=True, capture_output=True)
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True)
        try:
            (work / "root").rename(place)
        except OSError:
            assert place.exists()  # another run was first
    return place


def judged(seed: dict[str, bytes]) -> dict[str, Any]:
    """What cloud-init makes of a seed: the network's files by renderer, and ``users``. Fails where it
    finds anything wrong."""
    text = json.dumps({name: data.decode() for name, data in seed.items()})
    argv = [sys.executable, "-I", "-S", "-c", _JUDGE, str(unpacked())]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told
