"""The version of the installed distribution, read once."""

from importlib.metadata import version

VERSION = version("shoal")
