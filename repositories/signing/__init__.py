"""Signatures: made by gpg, proven by gpgv."""
