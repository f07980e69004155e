"""Dynamic zones: RFC 2136 with TSIG on a real BIND; what is by hand is never overwritten unseen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import dns.query
import dns.tsigkeyring
import dns.update
import pytest
from daemons import Daemons
from test_apply import ask
from test_farm_network import seal
from test_faults import killed
from yard import SECRET, Yard

from inventory.errors import Conflict, DriverFailed, FarmhandError, WrongState
from provision.network.live_dns import DnsServer
from tests import farm as use_cases

KEY = f'key "farmhand" {{\n\talgorithm hmac-sha256;\n\tsecret "{SECRET}";\n}};\n'


@pytest.fixture
def dynamic(yard: Yard, daemons: Daemons) -> Yard:
    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(KEY)
    key.chmod(0o640)
    yard.use("bind")
    yard.services["bind"] |= {"dynamic": "yes", "key": str(key)}
    daemons.start("bind")
    return yard


def by_hand(yard: Yard, change: str, *words: str, zone: str = "try.example.") -> None:
    message = dns.update.Update(zone, keyring=dns.tsigkeyring.from_text({"farmhand": SECRET}))
    getattr(message, change)(*words)
    assert dns.query.tcp(message, "127.0.0.1", port=5300).rcode() == 0


def pid_of(yard: Yard) -> str:
    return (yard.directory / "bind" / "pid").read_text()


def test_add_change_remove_without_a_reload(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("6.0.77.10.in-addr.arpa", "PTR") == ["dev2.try.example."]
    assert not yard.apply().changed
    files = {k: v for k, v in yard.snapshot().items() if "jnl" not in k}

    yard.vms["more"] = {"address": "10.77.0.9"}
    done = yard.apply()
    assert [a.text for a in done.actions if a.verb == "write"] == []
    assert ask("more.try.example", "A") == ["10.77.0.9"]
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == ["more.try.example."]
    yard.vms["more"]["address"] = "10.77.0.10"
    yard.apply()
    assert ask("more.try.example", "A") == ["10.77.0.10"]
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == []
    del yard.vms["more"]
    yard.apply()
    for kind in ("A", "AAAA", "TXT"):
        assert ask("more.try.example", kind) == []
    assert ask("10.0.77.10.in-addr.arpa", "PTR") == []
    kept = {k: v for k, v in yard.snapshot().items() if k in files and "/db." not in k}
    assert kept == {k: v for k, v in files.items() if k in kept}


def test_the_plan_is_what_is_done(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    yard.vms["more"] = {"address": "10.77.0.9"}
    planned = yard.plan()
    assert ask("more.try.example", "A") == []
    done = yard.apply()
    assert (planned.actions, planned.result.diff) == (done.actions, done.result.diff)
    assert "+more.try.example. A 10.77.0.9\n" in done.result.diff


def test_a_record_by_hand_is_not_overwritten_unseen(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    by_hand(yard, "add", "more", "300", "A", "10.77.0.99")
    yard.vms["more"] = {"address": "10.77.0.9"}
    with pytest.raises(Conflict, match=r"by hand: more\.try\.example A 10\.77\.0\.99"):
        yard.apply()
    assert ask("more.try.example", "A") == ["10.77.0.99"]
    yard.apply(force=True)
    assert ask("more.try.example", "A") == ["10.77.0.9"]


def test_our_record_changed_by_hand_is_noticed(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    by_hand(yard, "replace", "dev2", "300", "A", "10.77.0.66")
    with pytest.raises(Conflict, match=r"dev2\.try\.example A 10\.77\.0\.66"):
        yard.apply()
    yard.apply(force=True)
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]


def test_other_records_of_a_name_stay(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    by_hand(yard, "add", "more", "300", "MX", "10 mail.example.")
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    assert ask("more.try.example", "MX") == ["10 mail.example."]
    del yard.vms["more"]
    yard.apply()
    assert ask("more.try.example", "A") == []
    assert ask("more.try.example", "MX") == ["10 mail.example."]


def test_between_the_look_and_the_update(dynamic: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is quicker: the prerequisite says so, and what went before is put back."""
    yard = dynamic
    yard.apply()
    yard.vms["more"] = {"address": "10.77.0.9"}
    real = DnsServer._send
    sent = []

    def slow(self: DnsServer, batch: list) -> None:
        if not sent:
            by_hand(yard, "add", "9", "300", "PTR", "mine.example.", zone="0.77.10.in-addr.arpa.")
        sent.append(batch)
        real(self, batch)

    monkeypatch.setattr(DnsServer, "_send", slow)
    with pytest.raises(Conflict, match="changed it by hand"):
        yard.apply()
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == ["mine.example."]
    assert ask("more.try.example", "A") == []


def test_a_lost_state_file_loses_nothing(dynamic: Yard) -> None:
    yard = dynamic
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    with yard.site() as site:
        (site.paths.root / "network.db").unlink()
    del yard.vms["more"]
    yard.apply()
    assert ask("more.try.example", "A") == []
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert not yard.apply().changed


def test_with_clone_farm_and_destroy(dynamic: Yard) -> None:
    yard = dynamic
    seal(yard)
    with yard.site() as site:
        use_cases.clone_farm(site, wait=False)
        assert ask("prod.try.example", "A") == ["10.77.0.7"]
        use_cases.destroy(site, ["prod"])
        assert ask("prod.try.example", "A") == []
        assert ask("7.0.77.10.in-addr.arpa", "PTR") == []
        use_cases.destroy(site)
    assert ask("dev2.try.example", "A") == []


def test_a_thousand_at_once(dynamic: Yard) -> None:
    yard = dynamic
    yard.network |= {"subnet": "10.77.0.0/16", "pool": []}
    yard.vms |= {f"vm{n}": {"address": f"10.77.{1 + n // 250}.{n % 250}"} for n in range(1000)}
    yard.apply()
    assert ask("vm999.try.example", "A") == ["10.77.4.249"]
    assert ask("249.4.77.10.in-addr.arpa", "PTR") == ["vm999.try.example."]
    assert not yard.apply().changed


@pytest.mark.parametrize("when", ["written", "done"])
def test_killed_at_every_update(dynamic: Yard, when: str) -> None:
    """All old: neither a name without its pointer nor the other way stays."""
    yard = dynamic
    yard.apply()
    number, texts = 1, []
    while True:
        yard.vms["more"] = {"address": "10.77.0.9"}
        yard.vms["dev2"]["address"] = "10.77.0.8"
        text = killed(yard, when, number)
        if text is None:
            break
        texts.append(text)
        with yard.site() as site:
            use_cases.recover(site)
        new = text == "record what was written"
        assert ask("more.try.example", "A") == (["10.77.0.9"] if new else []), text
        assert ask("dev2.try.example", "A") == ["10.77.0.8" if new else "10.77.0.6"], text
        assert ask("9.0.77.10.in-addr.arpa", "PTR") == (["more.try.example."] if new else []), text
        assert ask("8.0.77.10.in-addr.arpa", "PTR") == (["dev2.try.example."] if new else []), text
        assert ask("6.0.77.10.in-addr.arpa", "PTR") == ([] if new else ["dev2.try.example."]), text
        del yard.vms["more"]
        yard.vms["dev2"]["address"] = "10.77.0.6"
        yard.apply()
        assert ask("6.0.77.10.in-addr.arpa", "PTR") == ["dev2.try.example."]
        number += 1
    assert sum(text.startswith("update ") for text in texts) >= 4, texts


def test_a_static_zone_becomes_dynamic(dynamic: Yard) -> None:
    """The records stay, and are known for ours."""
    yard = dynamic
    yard.services["bind"]["dynamic"] = "no"
    yard.apply()
    yard.services["bind"]["dynamic"] = "yes"
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("dev2.try.example", "TXT") == ['"farmhand try-it"']
    yard.vms["dev2"]["address"] = "10.77.0.8"
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.8"]


# ---- The key


def test_a_key_that_the_server_does_not_know(dynamic: Yard) -> None:
    yard = dynamic
    yard.apply()
    Path(yard.services["bind"]["key"]).write_text(KEY.replace(SECRET, "b3RoZXI="))
    yard.vms["more"] = {"address": "10.77.0.9"}
    with pytest.raises(DriverFailed, match=r"cannot (transfer|update) it") as caught:
        yard.apply()
    assert "b3RoZXI" not in str(caught.value.as_dict())


def test_a_key_that_everybody_can_read(dynamic: Yard) -> None:
    Path(dynamic.services["bind"]["key"]).chmod(0o644)
    with pytest.raises(WrongState, match="can be read by everybody"):
        dynamic.apply()


def test_a_key_from_the_environment(dynamic: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = dynamic
    del yard.services["bind"]["key"]
    main = yard.directory / "bind" / "named.conf"
    main.write_text(KEY + main.read_text())
    subprocess.run([*yard.services["bind"]["rndc"], "reconfig"], check=True)
    with pytest.raises(FarmhandError, match="FARMHAND_TSIG_KEY is empty"):
        yard.apply()
    monkeypatch.setenv("FARMHAND_TSIG_KEY", SECRET)
    done = yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert SECRET not in str(done.as_dict())
    with yard.site() as site:
        for path in site.paths.root.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
