"""Tests that need a booted Debian with a real systemd; `host.py` boots it."""
