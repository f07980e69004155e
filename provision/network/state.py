"""What was written where, so that it can be taken away again after it left the farm file; and the newest
serial number of each zone, so that a lost zone file doesn't take it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inventory.errors import WrongState
from provision.files import file_error, write_atomic
from provision.network.document import Document
from provision.network.live_dns import Records, Zones


@dataclass(frozen=True, slots=True)
class NetworkState:
    """``files``: documents without text, by path. ``records``: of dynamic zones, as applied last; None
    while that is not known for sure."""

    files: Mapping[str, Document] = field(default_factory=dict)
    serials: Mapping[str, int] = field(default_factory=dict)
    records: Zones | None = None


def read_state(path: Path) -> NetworkState:
    """Empty where there is none. WrongState where it can't be read."""
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        files = {
            name: Document(
                entry["service"],
                name,
                "",
                own=entry["own"],
                comment=(entry["comment"][0], entry["comment"][1]),
                zone=entry["zone"],
            )
            for name, entry in data["files"].items()
        }
        records = None
        if data.get("records") is not None:
            records = {zone: _names(names) for zone, names in data["records"].items()}
        serials = {str(zone): int(serial) for zone, serial in data["serials"].items()}
    except FileNotFoundError:
        return NetworkState()
    except OSError as error:
        raise file_error(error, path, "read") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WrongState(
            f"{path} is damaged: {error}",
            remedy="move it aside: what left the farm file since must then be removed by hand",
        ) from error
    return NetworkState(files, serials, records)


def _names(names: Mapping[str, Any]) -> dict[str, Records]:
    return {name: tuple((kind, value) for kind, value in found) for name, found in names.items()}


def write_state(path: Path, state: NetworkState) -> None:
    data = {
        "files": {
            name: {"service": d.service, "own": d.own, "comment": list(d.comment), "zone": d.zone}
            for name, d in sorted(state.files.items())
        },
        "serials": dict(sorted(state.serials.items())),
        "records": state.records,
    }
    write_atomic(path, (json.dumps(data) + "\n").encode())
