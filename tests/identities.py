"""Farms' identities for tests that make drivers and stores themselves."""

from __future__ import annotations

from hashlib import sha256

from hypervisors.ownership import FarmIdentity


def identity(name: str, file: str = "", controller: str = "ann@pc1") -> FarmIdentity:
    """The same for the same words, and another for others."""
    file = file or f"/home/ann/{name}.yaml"
    number = sha256(f"{name} {file} {controller}".encode()).hexdigest()[:32]
    return FarmIdentity(name, number, file, controller)


KATA = identity("kata")
