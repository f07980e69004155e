"""A client that looks at a repository again and again, by dnf's own library, for the system's Python:
``dnf_client.py DIRECTORY SETTING KEY STOP``. SETTING: as in a .repo file. KEY: a URL, or "". A look is a
line of JSON: the packages that it saw, the newest of which it downloaded, or what dnf complained of. It
ends when there is a file STOP. All that dnf keeps is below DIRECTORY."""

import json
import sys
from pathlib import Path

import dnf
import dnf.exceptions
import dnf.repo

_PLACES = {"installroot": "root", "cachedir": "cache", "persistdir": "persist", "logdir": "log"}


class _Yes:
    def _confirm(self, *_: object) -> bool:
        return True


def look(directory: str, setting: str, key: str) -> list[str]:
    with dnf.Base() as base:
        for name, place in _PLACES.items():
            Path(directory, place).mkdir(exist_ok=True)
            setattr(base.conf, name, f"{directory}/{place}")
        base.conf.reposdir = base.conf.pluginpath = base.conf.varsdir = [f"{directory}/nothing"]
        base.conf.substitutions["releasever"] = "1"
        repo = dnf.repo.Repo("base", base.conf)
        name, _, url = setting.partition("=")
        setattr(repo, name, [url] if name == "baseurl" else url)
        repo.skip_if_unavailable, repo.gpgcheck = False, False
        if key:
            repo.repo_gpgcheck, repo.gpgkey = True, [key]
            repo._key_import = _Yes()
        base.repos.add(repo)
        repo._repo.expire()  # what is kept of a look before is looked at again, also within a second
        base.fill_sack(load_system_repo=False)
        base.download_packages(list(base.sack.query().latest()))
        return sorted(str(package) for package in base.sack.query())


def main() -> None:
    directory, setting, key, stop = sys.argv[1:]
    while not Path(stop).exists():
        try:
            print(json.dumps({"seen": look(directory, setting, key)}), flush=True)
        except dnf.exceptions.Error as error:
            print(json.dumps({"failed": str(error)}), flush=True)


main()
