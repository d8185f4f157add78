"""Shoal's two data sets for torch, over a cluster that has the data."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

import shoal.torch
from benchmarks.loading.job import TOKENS, Epoch, Job, decoded


def stream(job: Job) -> Epoch:
    data = shoal.torch.IterableStream(
        job.url,
        batch_size=job.batch_size,
        shuffle=True,
        seed=job.seed,
        transform=None if job.kind == TOKENS else _pictures,
        storage_options=_options(job),
    )
    loader = job.loader(data, batch_size=None)
    return lambda epoch: loader


def samples(job: Job) -> Epoch:
    transform = None if job.kind == TOKENS else _picture
    data = shoal.torch.Samples(job.url, transform=transform, storage_options=_options(job))
    loader = job.loader(data, batch_size=job.batch_size, shuffle=True, collate_fn=shoal.torch.collate)
    return lambda epoch: loader


def _options(job: Job) -> dict[str, Any]:
    return {"endpoint": job.endpoint, "socket": job.socket}


def _pictures(table: pa.Table) -> Any:
    return shoal.torch.collate([decoded(data.as_buffer()) for chunk in table["bytes"].chunks for data in chunk])


def _picture(table: pa.Table) -> Any:
    return decoded(table["bytes"][0].as_buffer())
