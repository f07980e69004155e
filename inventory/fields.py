"""The kinds of values in a farm file: by which function of ``inventory.values`` each is read from text,
and what an editor may expect. Only ``inventory.annotations`` needs it.

Limits stand before the functions: so they are pydantic's own for the type, and no functions of its.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

# Looking for plugins reads every installed package's metadata.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, WithJsonSchema

from inventory import values


def _text(words: str, **more: object) -> WithJsonSchema:
    """What editors see: in YAML a name such as ``007`` is a number to them, here it is text."""
    return WithJsonSchema({"title": words, "type": ["string", "number"], **more})


Own = Literal["file", "block"]
_PlainLine = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(values.check_line)]
_KeyLine = Annotated[str, Field(min_length=1, max_length=16384), AfterValidator(values.check_key)]

Label = Annotated[
    str,
    AfterValidator(values.check_label),
    _text("name of a-z, 0-9 and '-', at most 63", pattern=f"^{values.LABEL}$"),
]
Hostname = Annotated[str, AfterValidator(values.check_hostname), _text("host name (RFC 1123)")]
Mac = Annotated[
    str,
    AfterValidator(values.check_mac),
    _text("MAC address", pattern="^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"),
]
Name = Annotated[
    str, AfterValidator(values.check_filename), _text("plain name", pattern=f"^{values.FILENAME}$")
]
ServedName = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(values.check_served),
    _text("name as the server has it", minLength=1, maxLength=255),
]
ConfigPath = Annotated[
    str,
    AfterValidator(values.check_config_path),
    _text("absolute path", pattern=f"^{values.CONFIG_PATH}$"),
]
Interface = Annotated[
    str, AfterValidator(values.check_interface), _text("interface", pattern=f"^{values.INTERFACE}$")
]
Line = Annotated[_PlainLine, _text("text on one line", minLength=1)]
Key = Annotated[_KeyLine, _text("public key, or a file of them", minLength=1)]
FilePath = Annotated[Path, InstanceOf(), BeforeValidator(values.to_path), _text("path", minLength=1)]
Address = Annotated[
    IPv4Address,
    InstanceOf(),
    BeforeValidator(values.to_address),
    WithJsonSchema({"title": "IPv4 address", "type": "string"}),
]
Subnet = Annotated[
    IPv4Network,
    InstanceOf(),
    BeforeValidator(values.to_subnet),
    WithJsonSchema({"title": "subnet such as 10.10.60.0/24", "type": "string"}),
]
Address6 = Annotated[
    IPv6Address,
    InstanceOf(),
    BeforeValidator(values.to_address6),
    WithJsonSchema({"title": "IPv6 address", "type": "string"}),
]
Subnet6 = Annotated[
    IPv6Network,
    InstanceOf(),
    BeforeValidator(values.to_subnet6),
    WithJsonSchema({"title": "subnet such as fd00:10:60::/64", "type": "string"}),
]
Range = Annotated[
    str,
    AfterValidator(values.check_range),
    WithJsonSchema({"title": "address, or range of two joined by '-'", "type": "string"}),
]
Revision = Annotated[str, AfterValidator(values.check_revision), _text("git revision")]
GitSource = Annotated[
    str,
    Field(min_length=1, max_length=4096),
    AfterValidator(values.check_repository),
    _text("git URL or directory", minLength=1),
]
DebianPackage = Annotated[str, AfterValidator(values.check_package), _text("Debian package name")]
Bool = Annotated[
    bool,
    BeforeValidator(values.to_bool),
    WithJsonSchema({"title": "yes or no", "enum": [True, False, "yes", "no", "on", "off"]}),
]
Count = Annotated[
    int,
    Field(ge=1, le=2**31),
    BeforeValidator(values.to_int),
    WithJsonSchema({"title": "whole number from 1", "type": ["integer", "string"], "minimum": 1}),
]
Cpus = Annotated[
    int,
    Field(ge=1, le=512),
    BeforeValidator(values.to_int),
    WithJsonSchema(
        {
            "title": "whole number from 1 to 512",
            "type": ["integer", "string"],
            "minimum": 1,
            "maximum": 512,
        }
    ),
]
Port = Annotated[
    int,
    Field(ge=1, le=65535),
    BeforeValidator(values.to_int),
    WithJsonSchema(
        {"title": "port from 1 to 65535", "type": ["integer", "string"], "minimum": 1, "maximum": 65535}
    ),
]
Size = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(values.to_size),
    WithJsonSchema({"title": "size such as 512M or 4G", "type": ["string", "integer"]}),
]
_DURATION = WithJsonSchema({"title": "duration such as 90s, 5m or 1h30m", "type": ["string", "number"]})
Seconds = Annotated[float, Field(gt=0), BeforeValidator(values.to_duration), _DURATION]
LeaseTime = Annotated[
    float, Field(ge=60, le=31536000), BeforeValidator(values.to_duration), _DURATION
]  # a year
TimeToLive = Annotated[
    float, Field(gt=0, le=values.MAX_TTL), BeforeValidator(values.to_duration), _DURATION
]
Script = Annotated[str, Field(min_length=1), _text("shell script", minLength=1)]


# One will do where there could be a list of them.
Scripts = Annotated[tuple[Script, ...], Field(min_length=1), BeforeValidator(values.one_or_many)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(values.one_or_many)]
SomeLines = Annotated[tuple[Line, ...], Field(min_length=1), BeforeValidator(values.one_or_many)]
Keys = Annotated[tuple[Key, ...], BeforeValidator(values.one_or_many)]
Labels = Annotated[tuple[Label, ...], BeforeValidator(values.one_or_many)]
Names = Annotated[tuple[Name, ...], BeforeValidator(values.one_or_many)]
EventTypes = Annotated[
    tuple[
        Literal[
            "operation", "operation.began", "operation.passed", "operation.failed",
            "operation.recovered", "build", "build.began", "build.passed", "build.failed",
            "build.recovered",
        ],
        ...,
    ],
    BeforeValidator(values.one_or_many),
]  # fmt: skip
Variable = Annotated[
    str,
    AfterValidator(values.check_variable),
    _text("environment variable", pattern=f"^{values.VARIABLE}$"),
]
WebAddress = Annotated[str, AfterValidator(values.check_web_address), _text("https URL", minLength=1)]
TimeLimit = Annotated[float, Field(ge=1, le=60), BeforeValidator(values.to_duration), _DURATION]
Hostnames = Annotated[tuple[Hostname, ...], BeforeValidator(values.one_or_many)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(values.one_or_many)]
Ranges = Annotated[tuple[Range, ...], BeforeValidator(values.one_or_many)]
DebianPackages = Annotated[tuple[DebianPackage, ...], BeforeValidator(values.one_or_many)]
