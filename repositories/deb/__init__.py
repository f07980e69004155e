"""Debian packages and archives."""
