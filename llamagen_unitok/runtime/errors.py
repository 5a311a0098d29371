"""Errors that several processes raise together."""

from __future__ import annotations


class ToldByMain(ValueError):
    """A ValueError that the main process raises too, and tells."""
