"""The ``shoal`` command."""

from shoal.cli.root import main

__all__ = ["main"]
