"""Shoal's client: ``fsspec`` URLs (``shoal://…``), and streams of samples for training.

    import shoal
    for batch in shoal.stream("shoal://imagenet/train/*.arrow", batch_size=256, shuffle=True):
        …

What is here is imported when it is first used, so that a program that only opens files pays for no more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal import torch
    from shoal.streaming.stream import Stream, stream

__all__ = ["Stream", "stream", "torch"]


def __getattr__(name: str) -> Any:
    if name in ("Stream", "stream"):
        return getattr(importlib.import_module("shoal.streaming.stream"), name)
    if name == "torch":
        return importlib.import_module("shoal.torch")
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
