"""Whatever a file holds, loading gives a farm or says what is wrong; what is right comes back equal."""

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inventory.annotations import adapter
from inventory.errors import InventoryError
from inventory.loader import loads
from inventory.model import Farm
from inventory.validation import validated

VALID = (Path(__file__).parents[2] / "inventory" / "gallifrey.yaml").read_bytes()
RICH = b"""\
farm: rich
hosts:
  h: {driver: kvm, uri: "qemu:///system", memory: 8G, disks: {store: zfs, pool: tank, dataset: a/b}}
  s: {driver: ssh}
network: {mode: bridge, bridge: br0, subnet: 10.1.0.0/24, gateway: 10.1.0.1, nameservers: [10.1.0.1],
          reserved: [10.1.0.9, 10.1.0.20-10.1.0.30], domain: x.example, addressing: dhcp}
templates: {t: {build: debian-12, size: 4G, packages: [gcc]}}
ssh: {user: root, users: {me: a.pub}, ready_timeout: 5m}
vms:
  dev2: &vm {host: h, memory: 2G, idle_memory: 1G, aliases: [a, b]}
  prod: {host: h, mac: 52:54:00:00:00:01, address: 10.1.0.8, nat_port: 22006,
         proxy: [{name: p, port: 80}]}
  old: {host: s, address: 192.0.2.1, ssh_port: 22, reset: [a, b], start: no}
source: {repository: ../kata, revision: v1.0}
cycle:
  steps:
    - {name: r, reset: dev2}
    - {name: b, vm: dev2, run: [make, make check], failure: source, artifacts: "*.rpm"}
    - {name: t, transfer: x, from: dev2, to: prod, into: /root, timeout: 1m}
"""


def survives(data: bytes) -> Farm | None:
    """Nothing but an InventoryError, each of its problems on one line and inside the file."""
    try:
        return loads(data, Path("f.yaml"))
    except InventoryError as error:
        assert error.problems
        lines = data.count(b"\n") + 2
        for problem in error.problems:
            assert 1 <= problem.line <= lines, problem
            assert problem.column >= 1
            assert problem.message
            assert problem.message.isprintable(), problem
        return None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    assert survives(data) is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("abk:-[]{},#&*!|>'\"%@`? \n\t\\~<0"), max_size=60))
def test_any_yaml_like_text(text: str) -> None:
    survives(text.encode())
    survives(b"farm: a\nvms: {a: {}}\ntemplates: {t: {build: x}}\n" + text.encode())


scalars = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "~", "1G", "022", "on", "10.0.0.1", "a b", "-", "x" * 64, "10.0.0.0/24", "\u0661"]
    ),
    st.sampled_from(
        ["kvm", "ssh", "user", "bridge", "dev2", "prod", "h", "t", "52:54:00:00:00:01", "9" * 30]
    ),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(scalars, inner, max_size=3)),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += paths(value[key], (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found += paths(item, (*path, number))
    return found


CONTENT = yaml.load(RICH, Loader=yaml.BaseLoader)
PATHS = paths(CONTENT)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_valid_file_with_parts_replaced_renamed_or_gone(data: st.DataObject) -> None:
    content = yaml.load(RICH, Loader=yaml.BaseLoader)
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(PATHS))
        holder: Any = content
        try:
            for part in path[:-1]:
                holder = holder[part]
            if not path:
                continue
            match data.draw(st.sampled_from(["replace", "remove", "rename"])):
                case "replace":
                    holder[path[-1]] = data.draw(trees)
                case "remove":
                    del holder[path[-1]]
                case "rename":
                    holder[data.draw(scalars)] = holder.pop(path[-1])
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    survives(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_valid_file_with_bytes_changed(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from([VALID, RICH]))
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(changed)))
        end = start + data.draw(st.integers(0, 6))
        changed[start:end] = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"\n", b"  ", b": ", b"- ", b"{", b"*vm"]))
        )
    survives(bytes(changed))


def test_the_files_that_are_changed_are_valid() -> None:
    assert survives(VALID)
    assert survives(RICH)


labels = st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z0-9]", fullmatch=True)
sizes = st.integers(1, 2**20).map(lambda n: n * 2**20)


@st.composite
def farms(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(labels, min_size=1, max_size=6, unique=True))
    subnet = IPv4Network("10.9.0.0/24")
    numbers = draw(st.lists(st.integers(2, 250), min_size=len(names), max_size=len(names), unique=True))
    vms: dict[str, Any] = {}
    for name, number in zip(names, numbers, strict=True):
        memory = draw(sizes)
        vm: dict[str, Any] = {
            "memory": memory,
            "vcpus": draw(st.integers(1, 8)),
            "start": draw(st.booleans()),
        }
        if draw(st.booleans()):
            vm["idle_memory"] = memory // 2
        if draw(st.booleans()):
            tail = ":".join(f"{draw(st.integers(0, 255)):02x}" for _ in range(4))
            vm["mac"] = f"52:{number:02x}:{tail}"
        if draw(st.booleans()):
            vm["address"] = IPv4Address("10.9.0.0") + number
        if draw(st.booleans()):
            vm["nat_port"] = 20000 + number
        vms[name] = vm
    one = st.sampled_from(names)
    text = st.text(
        st.characters(
            codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn"], exclude_characters="\ufeff"
        ),
        min_size=1,
        max_size=30,
    )
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(0, 4))):
        step: dict[str, Any] = {"name": f"step-{number}", "timeout": float(draw(st.integers(1, 9999)))}
        match draw(st.sampled_from(["reset", "run", "transfer"])):
            case "reset":
                step["reset"] = draw(one)
            case "run":
                step |= {"vm": draw(one), "run": tuple(draw(st.lists(text, min_size=1, max_size=3)))}
            case "transfer":
                step |= {"transfer": ("x*",), "from": draw(one), "to": draw(one), "into": draw(text)}
        steps.append(step)
    farm: dict[str, Any] = {
        "farm": draw(labels),
        "network": {"mode": "bridge", "bridge": "br0", "subnet": subnet, "internet": False},
        "templates": {draw(labels): {"build": draw(labels), "size": 2**20}},
        "vms": vms,
    }
    if steps:
        farm["cycle"] = {"steps": tuple(steps)}
    return farm


def as_text(value: Any) -> Any:
    """As YAML has it: with numbers, booleans and lists of its own."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [as_text(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


@settings(max_examples=60, deadline=None)
@given(farms())
def test_a_farm_written_as_yaml_comes_back_equal(farm: dict[str, Any]) -> None:
    model = validated(farm)
    text = yaml.safe_dump(as_text(farm), sort_keys=False, allow_unicode=True)
    assert loads(text.encode(), Path("f.yaml")) == model
    dumped = adapter(Farm).dump_python(
        model, mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
    )
    again = loads(yaml.safe_dump(dumped, allow_unicode=True, sort_keys=False).encode(), Path("g.yaml"))
    assert again == model
