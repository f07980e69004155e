"""Makes datamodel.json, what the tests need of XenAPI's data model: python trim.py FULL.json

FULL.json is the data model of xapi-project/xen-api v23.10.0 as its own generator writes it (ocaml/idl,
gen_json), with calls, classes, enums and errors. Left out are documentation and what the test server
doesn't know and we don't call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

WITHOUT = ("PBD", "host_metrics")


def trim(full: dict) -> dict:
    calls = {
        name: {
            "params": [[p["name"], p["type"], p["required"], p.get("default")] for p in call["params"]],
            "result": call["result"], "async": call["async"], "implicit": call["implicit"],
            "errors": call["errors"],
        }
        for name, call in sorted(full["calls"].items())
        if name.split(".")[0] not in WITHOUT and (name.split(".")[0] != "host" or call["implicit"])
    }  # fmt: skip
    classes = {
        name: {f: [d["type"], d["qualifier"], d["default"]] for f, d in sorted(body["fields"].items())}
        for name, body in full["classes"].items()
        if name not in WITHOUT
    }
    errors = {name: error["params"] for name, error in sorted(full["errors"].items())}
    return {
        "source": full["source"], "classes": classes, "enums": full["enums"], "errors": errors,
        "calls": calls,
    }  # fmt: skip


def lines(model: dict) -> str:
    """One entry a line, so that a diff can be read."""
    parts = []
    for section, body in model.items():
        if isinstance(body, str):
            parts.append(f'"{section}": {json.dumps(body)}')
            continue
        entries = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in body.items())
        parts.append(f'"{section}": {{\n{entries}\n}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    text = lines(trim(json.loads(Path(sys.argv[1]).read_text())))
    json.loads(text)
    Path(__file__).with_name("datamodel.json").write_text(text)
