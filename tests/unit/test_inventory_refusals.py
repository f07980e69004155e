"""Every refusal, in an admin's words, with its exact place."""

# ruff: noqa: E501 (a message stands on one line, as it is shown)

from pathlib import Path

import pytest

from inventory.errors import InventoryError, NotFound
from inventory.loader import load, loads

BASE = """\
farm: kata
templates: {base: {build: debian-12}}
vms:
  dev2: {memory: 1G}
  prod: {memory: 1G}
"""


def refused(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(InventoryError) as caught:
        loads(data, Path("f.yaml"))
    lines = str(caught.value).split("\n")
    assert len(lines) == len(caught.value.problems)
    return [line.removeprefix("f.yaml:") for line in lines]


TEXT = {
    b"": "1:1: the file is empty: a farm file has at least 'farm' and 'vms'",
    b"# nothing\n---\n": "1:1: the file is empty: a farm file has at least 'farm' and 'vms'",
    b"\n- a\n": "2:1: a farm file is made of keys with values, this is a list",
    b"text": "1:1: a farm file is made of keys with values, this is text",
    b"farm: \xff": "1:7: byte 0xff is not UTF-8",
    b"a: \xc3\xa4\nb: \xc3\xa4\xe4": "2:5: byte 0xe4 is not UTF-8",
    "farm: x".encode("utf-16"): "1:1: the file is UTF-16: save it as UTF-8",
    b"farm: a\0b": "1:8: character U+0000 is not allowed",
    b"a: b\rc: d": "1:5: character U+000D is not allowed",
    "a: b\n# x\u2028y".encode(): "2:4: character U+2028 is not allowed",
    b"vms:\n\tdev2: {}": "2:1: not YAML: a tab: indent with spaces",
    b"a: @b": "1:4: not YAML: nothing can begin with '@': put quotes around text",
    b"a: b: c": "1:5: not YAML: a second ':' in one line: put quotes around text that contains ': '",
    b"a: 1\nb: 'x\nc: 2\n": "2:4: not YAML: this quote is never closed",
    b"a: 1\n--- \nb: 2\n": "2:1: a second document: one farm file, one farm",
    b"a: &a [*a]": "1:8: alias *a stands inside what it stands for",
    b"a: *b": "1:4: alias *b: there is no &b before it",
    b"a: " + b"[" * 60: "1:53: nested too deeply",
}


@pytest.mark.parametrize("data", TEXT, ids=repr)
def test_text_that_is_no_farm(data: bytes) -> None:
    assert TEXT[data] in refused(data)


def test_too_large() -> None:
    assert refused(b"#" * (8 * 2**20 + 1)) == ["1:1: larger than 8 MiB: not a farm file"]


def test_aliases_of_aliases_end() -> None:
    text = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
    )
    assert any("aliases of aliases" in line for line in refused(text))


NOT_PLAIN = {
    "x: {a: 1, b: 2, a: 3}": "6:17: duplicate key 'a': it is in line 6, column 5 already",
    "farm: other": "6:1: duplicate key 'farm': it is in line 1, column 1 already",
    "source: !!python/object:os.system {}": "6:9: tag '!!python/object:os.system': tags are not allowed here",
    "source: {repository: !!str 5}": "6:22: tag '!!str': tags are not allowed here",
    "<<: {a: 1}": "6:1: merge keys ('<<') are not supported: write it out",
    "? [a]\n: b": "6:3: a key must be a word, not a list or mapping",
    "?\n: b": "6:2: a key is missing before ':'",
    "source: {repository: ~}": "6:22: ~ says nothing: leave the key out (or quote it, if it is meant as text)",
    'source: {repository: "a\\0b"}': "6:22: character U+0000, written as an escape, is not allowed",
}


@pytest.mark.parametrize("line", NOT_PLAIN, ids=repr)
def test_yaml_that_surprises(line: str) -> None:
    assert NOT_PLAIN[line] in refused(BASE + line + "\n")


def vm(*lines: str, top: str = "") -> str:
    return (
        BASE.replace("  prod: {memory: 1G}\n", "  prod:\n" + "".join(f"    {x}\n" for x in lines)) + top
    )


LABEL = "is not a host name label: use a-z, 0-9 and '-', at most 63, not beginning or ending with '-'"
INT = "is not a whole number (write it in plain digits)"
VM_VALUES = {
    # YAML's traps: nothing is read as something else
    "memory: 1_000": "6:13: vms.prod.memory: '1_000' is not a size: write a number with K, M, G or T, such as 512M or 4G",
    "memory: 1e3": "6:13: vms.prod.memory: '1e3' is not a size: write a number with K, M, G or T, such as 512M or 4G",
    "memory: 0": "6:13: vms.prod.memory: 0 is too little: it must be more than 0",
    "memory: 9999999T": "6:13: vms.prod.memory: '9999999T' is more than any machine has",
    "ssh_port: 022": f"6:15: vms.prod.ssh_port: '022' {INT}",
    "ssh_port: 0x16": f"6:15: vms.prod.ssh_port: '0x16' {INT}",
    "ssh_port: 1e3": f"6:15: vms.prod.ssh_port: '1e3' {INT}",
    "ssh_port: 2_2": f"6:15: vms.prod.ssh_port: '2_2' {INT}",
    "ssh_port: 22:06": f"6:15: vms.prod.ssh_port: '22:06' {INT}",
    "ssh_port: \u0662\u0662": f"6:15: vms.prod.ssh_port: '\u0662\u0662' {INT}",
    "ssh_port: 0": "6:15: vms.prod.ssh_port: 0 is too little: it must be 1 or more",
    "nat_port: 65536": "6:15: vms.prod.nat_port: 65536 is too much: at most 65535",
    "vcpus: 0": "6:12: vms.prod.vcpus: 0 is too little: it must be 1 or more",
    "start: y": "6:12: vms.prod.start: 'y' is not yes or no",
    "start:": "6:5: vms.prod.start: it has no value: give it one, or leave the key out",
    "memory: [1G]": "6:13: vms.prod.memory: a single value is expected here, not a list",
    "mac: 52:54:00:12:34": "6:10: vms.prod.mac: '52:54:00:12:34' is not a MAC address: write six pairs, such as 52:54:00:12:34:56",
    "mac: 53:54:00:12:34:56": "6:10: vms.prod.mac: 53:54:00:12:34:56 is a multicast address; a machine's own has an even first pair",
    "mac: 00:00:00:00:00:00": "6:10: vms.prod.mac: 00:00:00:00:00:00 is nobody's address",
    "address: 10.0.0.256": "6:14: vms.prod.address: '10.0.0.256' is not an IPv4 address such as 10.10.60.6",
    "hostname: a b": f"6:15: vms.prod.hostname: 'a b' {LABEL}",
    'hostname: "a\\nb"': f"6:15: vms.prod.hostname: 'a\\nb' {LABEL}",
    "hostname: '\"'": f"6:15: vms.prod.hostname: '\"' {LABEL}",
    "hostname: k\u00e4ta": "6:15: vms.prod.hostname: 'k\u00e4ta' is not ASCII: write xn--kta-qla (IDNA)",
    f"hostname: {'a' * 64}": f"6:15: vms.prod.hostname: '{'a' * 57}...' {LABEL}",
    f"hostname: {'a.' * 127}a": "6:15: vms.prod.hostname: a host name has at most 253 characters (RFC 1035)",
    "hostname: 10.0.0.1": "6:15: vms.prod.hostname: '10.0.0.1' is not a host name: its last part is a number",
    "aliases: [ok, -x]": f"6:19: vms.prod.aliases[1]: '-x' {LABEL}",
    "aliases: {a: b}": "6:14: vms.prod.aliases: a list is expected here, not keys with values",
    "proxy: [{name: a, port: x}]": f"6:29: vms.prod.proxy[0].port: 'x' {INT}",
    "proxy: [{port: 80}]": "6:13: vms.prod.proxy[0]: 'name' is missing",
    "memry: 1G": "6:5: vms.prod: unknown key 'memry'; did you mean 'memory'?",
    "idle_memory: 2G": "6:18: vms.prod.idle_memory: idle_memory, 2G, is more than memory, 1G",
    "template: bse": "6:15: vms.prod.template: no template 'bse'; did you mean 'base'?",
    "template: other": "6:15: vms.prod.template: no template 'other'; known: base",
    "host: her": "6:11: vms.prod.host: no host 'her'; did you mean 'here'?",
    "disk: 1G": "6:11: vms.prod.disk: 1G is less than the 4G of template base",
    "reset: [x]": "6:5: vms.prod.reset: 'reset' is for VMs on ssh hosts; driver kvm resets this one itself",
    "hostname: dev2": "6:15: vms.prod.hostname: host name 'dev2' is taken: vms.dev2 has it (line 4)",
    "aliases: [x, dev2]": "6:18: vms.prod.aliases[1]: name 'dev2' is taken: vms.dev2 has it (line 4)",
    "aliases: [x, x]": "6:18: vms.prod.aliases[1]: name 'x' is taken: vms.prod.aliases[0] has it (line 6)",
    "proxy: [{name: dev2}]": "6:20: vms.prod.proxy[0].name: name 'dev2' is taken: vms.dev2 has it (line 4)",
}  # fmt: skip


@pytest.mark.parametrize("line", VM_VALUES, ids=repr)
def test_one_wrong_line_of_a_vm(line: str) -> None:
    assert refused(vm(line)) == [VM_VALUES[line]]


TOP = {
    "sorce: {}": "6:1: unknown key 'sorce'; did you mean 'source'?",
    "network: {lease_time: 59}": "6:23: network.lease_time: 59 is too little: it must be 60 or more",
    "network: {lease_time: 366d}": "6:23: network.lease_time: 366d is too much: at most 31536000",
    "ssh: {ready_timeout: 0}": "6:22: ssh.ready_timeout: 0 is too little: it must be more than 0",
    f"source: {{repository: {'x' * 4097}}}": "6:22: source.repository: longer than 4096 characters",
    "hosts: {}": "6:8: hosts: at least one is needed",
    "hosts: {a/b: {}}": "6:9: hosts.'a/b': 'a/b' is not a plain name: letters, digits, '.', '_' and '-', "
    "at most 64, beginning with a letter or digit",
    "hosts: {here: {driver: kvmm}}": "6:24: hosts.here.driver: 'kvmm' is not one of "
    "kvm, xen, xenapi, ssh, fake; did you mean 'kvm'?",
    "hosts: {here: {accelerator: tgc}}": "6:29: hosts.here.accelerator: 'tgc' is not one of "
    "auto, kvm, tcg; did you mean 'tcg'?",
    "hosts: {here: {driver: xen, uri: 'xen:///', accelerator: tcg}}": "6:45: hosts.here: "
    "'accelerator' is for driver kvm; the driver is xen",
    "hosts: {here: {driver: xen}}": "6:24: hosts.here: driver xen needs 'uri', such as xen:///system",
    "hosts: {here: {driver: xen, uri: private}}": "6:34: hosts.here.uri: "
    "driver xen needs 'uri', such as xen:///system",
    "hosts: {here: {driver: xenapi, credentials: c}}": "6:24: hosts.here: "
    "driver xenapi needs 'uri', an https URL",
    "hosts: {here: {driver: fake, uri: 'qemu:///system'}}": "6:30: hosts.here: "
    "'uri' is for driver kvm, xen and xenapi; the driver is fake",
    "hosts: {here: {driver: [kvm]}}": "6:24: hosts.here.driver: a single value is expected here, "
    "not a list",
    "hosts: {here: {driver: }}": "6:16: hosts.here.driver: it has no value: give it one, or leave the "
    "key out",
    "hosts: {here: {driver: xeapi, uri: 'https://x', credentials: c, sr: x}}": "6:24: hosts.here.driver: "
    "'xeapi' is not one of kvm, xen, xenapi, ssh, fake; did you mean 'xenapi'?",
    "hosts: {here: {drver: xen, guests: pvh}}": "6:16: hosts.here: unknown key 'drver'; "
    "did you mean 'driver'?",
    "hosts: {here: kvm}": "6:15: hosts.here: keys with values are expected here, not 'kvm'",
    "hosts: {here: {uri: privat}}": "6:21: hosts.here.uri: 'privat' is neither 'private' nor a libvirt URI",
    "hosts: {here: {memory: 512M}}": "4:18: vms.dev2.memory: 1G is more than the 512M "
    "that host here has for the farm",
    "hosts: {a: {}, b: {}}": "4:3: vms.dev2: which host? It needs 'host', one of: a, b",
    "hosts: {here: {disks: {store: zfs}}}": "6:31: hosts.here.disks.store: a zfs store needs 'pool'",
    "hosts: {here: {disks: {pool: x}}}": "6:30: hosts.here.disks.pool: "
    "a qcow2 store has 'path', not 'pool'",
    "hosts: {here: {disks: {store: lvm, pool: x, path: /y}}}": "6:51: hosts.here.disks.path: "
    "a lvm store has 'pool', not 'path'",
    "hosts: {here: {disks: {store: lvm-thin, pool: x}}}": "6:31: hosts.here.disks.store: "
    "an lvm-thin store needs 'dataset', the thin pool",
    "hosts: {here: {disks: {copy: full}}}": "6:30: hosts.here.disks.copy: 'copy: full' is for an lvm store",
    "hosts: {here: {disks: {copy_mode: full}}}": "6:24: hosts.here.disks: "
    "unknown key 'copy_mode'; did you mean 'copy'?",
    "network: {mode: bridge, subnet: 10.0.0.0/24}": "6:17: network.mode: mode bridge needs 'bridge'",
    "network: {bridge: br0}": "6:19: network.bridge: 'bridge' is for mode bridge; the mode is user",
    "network: {mode: network, network: n}": "6:1: network: static addresses need 'subnet' "
    "(or set 'addressing: dhcp')",
    "network: {subnet: 10.0.0.1/24}": "6:19: network.subnet: '10.0.0.1/24' is not a subnet such as "
    "10.10.60.0/24 (no host bits set)",
    "network: {subnet: 10.0.0.0}": "6:19: network.subnet: '10.0.0.0' is not a subnet such as "
    "10.10.60.0/24 (no host bits set)",
    "network: {subnet: 10.0.0.0/31}": "6:19: network.subnet: 10.0.0.0/31 has no room for machines",
    "network: {subnet: 10.0.0.0/24, gateway: 10.0.1.1}": "6:41: network.gateway: "
    "10.0.1.1 is outside 10.0.0.0/24",
    "network: {subnet: 10.0.0.0/24, gateway: 10.0.0.255}": "6:41: network.gateway: "
    "10.0.0.255 is not a machine's address",
    "network: {subnet: 10.0.0.0/24, reserved: [10.0.0.1, 10.0.1.1]}": "6:53: network.reserved[1]: "
    "outside the subnet, 10.0.0.0/24",
    "network: {reserved: [10.0.0.9-10.0.0.1]}": "6:22: network.reserved[0]: "
    "'10.0.0.9-10.0.0.1' ends before it begins",
    "network: {reserved: [10.0.0.x]}": "6:22: network.reserved[0]: '10.0.0.x' is not an address "
    "or a range such as 10.10.60.200-10.10.60.254",
    "network: {mode: bridge, bridge: b, subnet: 10.0.0.0/30, gateway: 10.0.0.1}": "6:44: network.subnet: "
    "10.0.0.0/30 has 1 addresses left, and 2 VMs want one",
    "network: {mode: bridge, bridge: b, subnet: 10.0.0.0/24, internet: on}": "6:67: network.internet: "
    "'internet' is for mode user: elsewhere it's the host's matter",
    "source: {revision: x}": "6:1: source: a source needs either 'repository' or 'example'",
    "build: {builders: [dev2], repository: r, directory: x, example: deb}\n"
    "repositories: {r: {format: deb}}": "6:65: build.example: 'directory' or 'example', not both",
    "source: {repository: ''}": "6:22: source.repository: it is empty",
    "source: {repository: --upload-pack=x}": "6:22: source.repository: "
    "'--upload-pack=x' is not a git URL or a directory",
    "source: {repository: 'ext::sh -c x'}": "6:22: source.repository: "
    "'ext::sh -c x' is not a git URL or a directory",
    "source: {repository: x, revision: a..b}": "6:35: source.revision: 'a..b' is not a git revision "
    "(gitrevisions(7)): a branch, tag or commit",
    "source: {repository: x, revision: -x}": "6:35: source.revision: '-x' is not a git revision "
    "(gitrevisions(7)): a branch, tag or commit",
    "source: [x]": "6:9: source: keys with values are expected here, not a list",
    "ssh: {authorized_keys: ssh-ed25519 AAAA}": "6:24: ssh.authorized_keys: "
    "'ssh-ed25519 AAAA' is a damaged public key",
    "ssh: {authorized_keys: '-----BEGIN OPENSSH PRIVATE KEY-----'}": "6:24: ssh.authorized_keys: "
    "this is not a public key: never put a private key into a farm file",
    "ssh: {key: ''}": "6:12: ssh.key: an empty path",
    "ssh: {ready_timeout: 5 minutes}": "6:22: ssh.ready_timeout: '5 minutes' is not a duration: "
    "write 90s, 5m or 1h30m",
}


@pytest.mark.parametrize("line", TOP, ids=repr)
def test_one_wrong_line_of_the_rest(line: str) -> None:
    found = refused(BASE + line + "\n")
    assert TOP[line] in found
    assert len(found) == (2 if "vms.dev2" in TOP[line] else 1)  # what is said of dev2 holds for prod


KINDS = "'reset', 'checkout', 'run', 'transfer', 'use', 'publish' and 'fetch'"
STEPS = {
    "{name: a, reset: dev}": "8:24: step a: reset: no VM 'dev'; did you mean 'dev2'?",
    "{name: a, vm: dev2, rn: x}": "8:7: step a: unknown key 'rn'; did you mean 'run'?",
    "{name: a, vm: dev2}": f"8:7: step a: a step has one of {KINDS}, which say what it does",
    "{name: a, run: x, reset: dev2, vm: dev2}": f"8:7: step a: a step has one of {KINDS}; "
    "this one has reset and run",
    "{name: a, run: x}": "8:7: step a: 'vm' is missing",
    "{name: a, run: x, vm: dev2, timout: 5m}": "8:35: step a: unknown key 'timout'; did you mean 'timeout'?",
    "{name: a, run: x, vm: dev2, timeout: soon}": "8:44: step a: timeout: 'soon' is not a duration: "
    "write 90s, 5m or 1h30m",
    "{name: a, run: [], vm: dev2}": "8:22: step a: run: at least one is needed",
    "{name: a, run: x, vm: dev2, failure: sauce}": "8:44: step a: failure: 'sauce' is not one of source, "
    "dependencies, environment, network, infrastructure, time-out; did you mean 'source'?",
    "{name: a, transfer: x, form: dev2, to: prod, into: /x}": "8:30: step a: unknown key 'form'; "
    "did you mean 'from'?",
    "{name: a, transfer: x, from: dev2, to: prd, into: /x}": "8:46: step a: to: no VM 'prd'; "
    "did you mean 'prod'?",
    "{run: x, vm: dev2}": "8:7: step 1: 'name' is missing",
    "{name: A b, run: x, vm: dev2}": f"8:14: step 'A b': name: 'A b' {LABEL}",
    "make": "8:7: step 1: a step is made of keys with values, such as 'name' and 'run'",
    "{name: a, reset: dev2}\n    - {name: a, reset: prod}": "9:14: step a: name: "
    "a step of this name is in line 8",
}


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_one_wrong_step(step: str) -> None:
    assert refused(f"{BASE}cycle:\n  steps:\n    - {step}\n") == [STEPS[step]]


XENAPI = {
    "credentials: x.cred": "6:16: hosts.here: 'credentials' is for driver xenapi; the driver is kvm",
    "ca: x.pem": "6:16: hosts.here: 'ca' is for driver xenapi; the driver is kvm",
    "fingerprint: x": "6:16: hosts.here: 'fingerprint' is for driver xenapi; the driver is kvm",
    "insecure: yes": "6:16: hosts.here: 'insecure' is for driver xenapi; the driver is kvm",
    "sr: x": "6:16: hosts.here: 'sr' is for driver xenapi; the driver is kvm",
    "copy: full": "6:16: hosts.here: 'copy' is for driver xenapi; the driver is kvm",
    "driver: xenapi, uri: 'https://x'": "6:24: hosts.here: driver xenapi needs 'credentials', a file",
    "driver: xenapi, uri: 'http://x', credentials: c": "6:37: hosts.here.uri: driver xenapi needs 'uri', an https URL",
    "driver: xenapi, uri: 'https://x', credentials: c, insecure: maybe": "6:76: hosts.here.insecure: "
    "'maybe' is not yes or no",
    "driver: xenapi, uri: 'https://x', credentials: c, ca: x, insecure: yes": "6:83: hosts.here.insecure: "
    "either 'ca' or 'insecure', not both",
    "driver: xenapi, uri: 'https://x', credentials: c, ca: x, fingerprint: y": "6:86: hosts.here.fingerprint: "
    "either 'ca' or 'fingerprint', not both",
    "driver: xenapi, uri: 'https://x', credentials: c, fingerprint: '00:11'": "6:79: hosts.here.fingerprint: "
    "a SHA-256 has 64 hexadecimal digits, colons between or not",
    "driver: xenapi, uri: 'https://x', credentials: c, sr: ''": "6:70: hosts.here.sr: it is empty",
    "driver: xenapi, uri: 'https://x', credentials: c, copy: half": "6:72: hosts.here.copy: "
    "'half' is not one of linked, full",
    "driver: xenapi, uri: 'https://x', credentials: c, disks: {store: zfs, pool: x}": "6:66: hosts.here: "
    "a xenapi server owns its storage: 'sr' names it",
}


@pytest.mark.parametrize("keys", XENAPI, ids=repr)
def test_one_wrong_key_of_a_xenapi_host(keys: str) -> None:
    network = "network: {mode: network, network: build, addressing: dhcp}"
    found = refused(f"{BASE}hosts: {{here: {{{keys}}}}}\n{network}\n")
    assert [line for line in found if line.startswith("6:")] == [XENAPI[keys]]


SERVED = "{driver: xenapi, uri: 'https://x', credentials: c}"
SEEN = "has characters that can't be seen, or a line break"
NAMES = {
    r'"a\nb"': rf"'a\nb' {SEEN}",
    r'"\u202Egnp"': rf"'\u202egnp' {SEEN}",
    '"build "': "'build ' begins or ends with a space",
    '""': "it is empty",
    f'"{"n" * 256}"': "a name has at most 255 characters",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
@pytest.mark.parametrize("key", ["network", "sr"])
def test_one_bad_name_of_a_server(key: str, name: str) -> None:
    sr, network = (name, "build") if key == "sr" else ("Local storage", name)
    host = SERVED.replace("}", f", sr: {sr}}}")
    hosts, place = f"hosts:\n  here: {host}", "network: {mode: network, addressing: dhcp, network: "
    found = refused(f"{BASE}{hosts}\n{place}{network}}}\n")
    where = "hosts.here.sr" if key == "sr" else "network.network"
    assert [line.split(": ", 1)[1] for line in found] == [f"{where}: {NAMES[name]}"]


FREE = '"Pool-wide network associated with eth0"'


@pytest.mark.parametrize(
    ("hosts", "services"),
    [
        ("{here: {}}", ""),
        (f"{{here: {SERVED}, other: {{}}}}", ""),
        (f"{{here: {SERVED}}}", "services: {libvirt: {uri: 'qemu:///system'}}\n"),
    ],
)
def test_any_text_names_a_network_of_xenapi_hosts_only(hosts: str, services: str) -> None:
    network = f"network: {{mode: network, addressing: dhcp, network: {FREE}}}"
    text = BASE.replace("prod: {", "prod: {host: other, ") if "other" in hosts else BASE
    text = text.replace("dev2: {", "dev2: {host: here, ") if "other" in hosts else text
    found = refused(f"{text}hosts: {hosts}\n{network}\n{services}")
    assert any("is not a libvirt network's name" in line for line in found), found


def test_a_xenapi_server_boots_no_kernel_of_ours() -> None:
    xenapi = "{here: {driver: xenapi, uri: 'https://x', credentials: c}}"
    text = BASE.replace("debian-12", "debian-12, boot: {kernel: /vmlinuz, cmdline: ro}")
    network = "network: {mode: network, network: build, addressing: dhcp}"
    assert refused(f"{text}hosts: {xenapi}\n{network}\n") == [
        f"{line}:3: vms.{vm}: it is on a xenapi host, which boots from the disk; its template has 'boot'"
        for line, vm in ((4, "dev2"), (5, "prod"))
    ]


def test_what_cannot_start_by_efi() -> None:
    image = BASE.replace("build: debian-12", "import: x, firmware: efi")
    for host, called in (("fake", "a fake host"), ("xen, uri: 'xen:///system'", "a xen host")):
        network = "network: {mode: network, network: build, addressing: dhcp}"
        assert refused(f"{image}hosts: {{here: {{driver: {host}}}}}\n{network}\n") == [
            f"{line}:3: vms.{vm}: it is on {called}, which can't start by EFI; "
            "its template has 'firmware: efi'"
            for line, vm in ((4, "dev2"), (5, "prod"))
        ]
    (problem,) = refused(BASE.replace("debian-12", "debian-12, firmware: efi"))
    assert problem.endswith("templates.base.firmware: what is built starts by BIOS")
    (problem,) = refused(image.replace("efi}", "efi, boot: {kernel: /k, cmdline: ro}}"))
    assert problem.endswith("'firmware' starts from the disk, and 'boot' doesn't")


def test_what_a_file_can_not_be_without() -> None:
    assert refused("source: {repository: x}\n") == ["1:1: 'farm' is missing", "1:1: 'vms' is missing"]
    assert refused("farm: a\nvms: {}\n") == ["2:6: vms: at least one is needed"]
    assert refused("farm: a\nvms: {x: {}}\n") == [
        "2:7: vms.x: it needs a template, and the file has no 'templates'"
    ]
    assert refused("farm: a\nhosts: {h: {driver: ssh}}\nvms: {x: {}}\n") == [
        "3:7: vms.x: a VM on an ssh host needs 'address'"
    ]


def test_templates() -> None:
    def with_templates(text: str) -> list[str]:
        return refused(BASE.replace("{base: {build: debian-12}}", text))

    assert with_templates("{base: {}}") == [
        "2:13: templates.base: a template needs either 'build' or 'import'"
    ]
    assert with_templates("{base: {build: a, import: b}}") == [
        "2:38: templates.base.import: a template has either 'build' or 'import', not both"
    ]
    assert with_templates("{base: {import: b, packages: [gcc]}}") == [
        "2:41: templates.base.packages: 'packages' is for templates that are built"
    ]
    assert with_templates("{base: {build: a, boot: {kernel: vmlinuz, cmdline: ro}}}") == [
        "2:45: templates.base.boot.kernel: 'vmlinuz' is not an absolute path as taken here: begin with "
        "'/', use letters, digits and '_', '@', '+', '.', '-', and no '..'"
    ]
    assert with_templates("{base: {build: a, boot: {kernel: /boot/vmlinuz}}}") == [
        "2:30: templates.base.boot: 'cmdline' is missing"
    ]
    assert with_templates("{a: {build: x}, b: {build: y}}") == [
        "4:3: vms.dev2: which template? It needs 'template', one of: a, b",
        "5:3: vms.prod: which template? It needs 'template', one of: a, b",
    ]


def test_names_together_are_a_label() -> None:
    text = BASE.replace("farm: kata", f"farm: {'k' * 60}")
    assert [line.split(": ")[0:2] for line in refused(text)] == [
        ["4:3", "vms.dev2"],
        ["5:3", "vms.prod"],
    ]


def test_hostile_vm_names() -> None:
    for name, shown in (('"a\\nb"', "'a\\nb'"), ("'a\"b'", "'a\"b'"), ("A", "'A'"), ("../x", "'../x'")):
        found = refused(BASE + f"  {name}: {{}}\n")
        assert len(found) == 1
        assert found[0].startswith("6:3: vms.")
        assert found[0].endswith(f"{shown} {LABEL}")
    assert refused(BASE + "  007: {}\n") == [
        "6:3: vms.007: its name is a number: give it a 'hostname' that is not"
    ]


NETWORK = "network: {mode: bridge, bridge: b, subnet: 10.0.0.0/24, gateway: 10.0.0.1, reserved: [10.0.0.5-10.0.0.9]}\n"


def test_addresses_in_the_subnet() -> None:
    for address, words in (
        ("10.0.1.2", "outside the subnet, 10.0.0.0/24"),
        ("10.0.0.0", "the network's own address"),
        ("10.0.0.255", "the broadcast address"),
        ("10.0.0.1", "the gateway's address"),
        ("10.0.0.7", "reserved (10.0.0.5-10.0.0.9)"),
    ):
        assert refused(vm(f"address: {address}", top=NETWORK)) == [
            f"6:14: vms.prod.address: {address} is {words}"
        ]


def test_things_that_must_differ() -> None:
    text = BASE.replace(
        "{memory: 1G}", "{mac: 52:54:00:00:00:01, address: 10.0.0.10, ssh_port: 2200, nat_port: 22006}"
    )
    assert refused(text) == [
        "5:15: vms.prod.mac: 52:54:00:00:00:01 is taken: vms.dev2.mac has it (line 4)",
        "5:43: vms.prod.address: 10.0.0.10 is taken: vms.dev2.address has it (line 4)",
        "5:64: vms.prod.ssh_port: port 2200 is taken: vms.dev2.ssh_port has it (line 4)",
        "5:80: vms.prod.nat_port: port 22006 is taken: vms.dev2.nat_port has it (line 4)",
    ]


def test_names_are_compared_with_their_domain() -> None:
    text = vm("aliases: [dev2.farm.example]", top="network: {domain: farm.example}\n")
    assert refused(text) == [
        "6:15: vms.prod.aliases[0]: name 'dev2.farm.example' is taken: vms.dev2 has it (line 4)"
    ]


def test_ssh_machines() -> None:
    text = """\
farm: a
hosts: {h: {driver: ssh}}
templates: {t: {build: debian-12}}
vms:
  x: {address: 192.0.2.1, template: t}
  y: {address: 192.0.2.1, ssh_port: 22}
  z: {address: 192.0.2.1, ssh_port: 23}
cycle:
  steps:
    - {name: r, reset: x}
"""
    assert refused(text) == [
        "5:37: vms.x.template: a VM on an ssh host is not made from a template",
        "6:16: vms.y.address: 192.0.2.1 port 22 is taken: vms.x.address has it (line 5)",
        "10:24: step r: reset: VM x is on an ssh host and has no 'reset' command",
    ]


def test_everything_at_once_in_the_order_of_lines() -> None:
    text = """\
farm: Kata
hosts: {here: {driver: kvmm, memory: 512M}}
network: {mode: bridge, subnet: 10.10.60.0/24, gateway: 10.10.61.1, reserved: [1.2.3.4]}
templates: {base: {build: a, import: b, sise: 4G}}
vms:
  dev2: {host: heer, template: bas, memry: 1G, mac: 52:54}
  prod:
    idle_memory: 2G
    memory: 1G
    memory: 2G
    aliases: [bad name, dev2]
  t:
source:
cycle:
  steps:
    - {name: a, vm: dev, run: x, timeout: soon}
    - {nme: x, rst: dev2}
"""
    assert [line.split(" ")[0].rstrip(":") for line in refused(text)] == [
        "1:7", "2:24", "3:17", "3:57", "3:80", "4:38", "4:41", "6:16", "6:32", "6:37", "6:53",
        "8:18", "9:13", "10:5", "11:15", "11:25", "12:3", "13:1", "16:21", "16:43", "17:7",
    ]  # fmt: skip


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        load(tmp_path / "none.yaml")
    assert str(missing.value) == f"no farm file {tmp_path}/none.yaml"
    assert "--farm" in missing.value.remedy
    for path, words in (
        (tmp_path, "a directory: a farm file is needed"),
        (Path("/dev/null"), "not a regular file: a farm file is needed"),
        (tmp_path / ("x" * 300), "it can't be read: File name too long"),
        (Path("a\0b"), "it can't be read: embedded null byte"),
    ):
        with pytest.raises(InventoryError) as caught:
            load(path)
        assert str(caught.value) == f"{path}:1:1: {words}"


def test_repositories() -> None:
    text = BASE + "repositories:\n"
    served = f"{text}  a: {{format: deb, url: 'http://packages.example/kata', serve: nginx}}\n"
    assert refused(served) == [
        "7:64: repositories.a.serve: 'services' has no nginx, so nobody serves it: add 'nginx: {}' there"
    ]
    (bad,) = refused(f"{served}services: {{nginx: 7}}\n")
    assert "services.nginx" in bad, "and nothing of what that leaves in doubt"
    assert refused(text + "  a: {format: deb, channels: [tested, '12']}\n") == [
        "7:30: repositories.a.channels: '12' is a generation's number: a channel's name has a letter"
    ]
    two = "  a: {{format: deb, path: {}}}\n  b: {{format: rpm, path: {}}}\n"
    assert refused(text + two.format("/srv/x", "/srv/x")) == [
        "8:26: repositories.b.path: repository a has the same directory: give each one its own"
    ]
    assert refused(text + two.format("/srv/x", "/srv/x/pool")) == [
        "8:26: repositories.b.path: repository a is in /srv/x, or around it: give each one its own"
    ]
    assert refused(text + two.format("/srv/x/b", "/srv/x")) == [
        "8:26: repositories.b.path: repository a is in /srv/x/b, or around it: give each one its own"
    ]
    assert refused(text + two.format("/", "/srv/x"))
    loads((text + two.format("/srv/x", "/srv/xy")).encode(), Path("f.yaml"))
