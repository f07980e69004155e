"""EFI firmware for KVM guests."""

OVMF = "/usr/share/ovmf/OVMF.fd"
"""Debian's OVMF, code and variables in one (package ovmf)."""
