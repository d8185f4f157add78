"""Other loaders, each over its own format of the same data on the local disk, written before anything is timed.

    MosaicML Streaming    MDS shards, shuffled by its default algorithm (py1e)
    WebDataset            tars, shuffled by shard and by a buffer
    HF datasets           streaming: the Arrow files themselves, or pictures in such ones; by shard and by a buffer

The rule: only the contender's own package is imported, when it is its turn: whichever are installed take part.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loading.job import BUFFER, LENGTH, TOKENS, Epoch, Job, collated, decoded

#: Bytes of a shard of a peer's format, and the least number of them: more than there are workers.
SHARD_BYTES, LEAST_SHARDS = 32 << 20, 8
#: Of a record batch.
PICTURES = 100


def mosaic(job: Job) -> Epoch:
    import streaming

    columns = {"tokens": f"ndarray:uint16:{LENGTH}"} if job.kind == TOKENS else {"image": "bytes"}
    with streaming.MDSWriter(out=job.scratch, columns=columns, size_limit=_shard_bytes(job)) as out:
        for sample in _samples(job):
            name = next(iter(columns))
            out.write({name: np.frombuffer(sample, np.uint16) if job.kind == TOKENS else sample})

    class Data(streaming.StreamingDataset):  # type: ignore[misc] # it may not be installed
        def __getitem__(self, number: Any) -> Any:
            sample = super().__getitem__(number)
            return sample if job.kind == TOKENS else decoded(sample["image"])

    data = Data(local=job.scratch, shuffle=True, batch_size=job.batch_size, shuffle_seed=job.seed)
    loader = job.loader(data, batch_size=job.batch_size)
    return lambda epoch: loader


def webdataset(job: Job) -> Epoch:
    import webdataset as wds

    urls = []
    suffix = "u16" if job.kind == TOKENS else "jpg"
    for number, samples in enumerate(_shards(job)):
        urls.append(str(Path(job.scratch) / f"{number:05}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for place, sample in enumerate(samples):
                info = tarfile.TarInfo(f"{number:05}-{place:07}.{suffix}")
                info.size = len(sample)
                tar.addfile(info, io.BytesIO(sample))

    def sample_of(sample: dict[str, Any]) -> Any:
        data = sample[suffix]
        if job.kind == TOKENS:
            return {"tokens": torch.frombuffer(bytearray(data), dtype=torch.uint16)}
        return decoded(data)

    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=job.seed, empty_check=False)
        .shuffle(BUFFER)
        .map(sample_of)
        .batched(job.batch_size, collation_fn=collated)
    )
    loader = job.loader(data, batch_size=None)
    return lambda epoch: loader


def datasets(job: Job) -> Epoch:
    import datasets as hf

    paths = [str(path) for path in job.paths()]
    if job.kind != TOKENS:
        paths = []
        for number, samples in enumerate(_shards(job)):
            paths.append(str(Path(job.scratch) / f"{number:05}.arrow"))
            table = pa.table({"image": list(samples)})
            with pa.ipc.new_file(paths[-1], table.schema) as writer:
                writer.write_table(table, max_chunksize=PICTURES)
    data = hf.load_dataset("arrow", data_files=paths, split="train", streaming=True, cache_dir=job.scratch)
    if job.kind == TOKENS:
        data = data.with_format("torch")
    else:
        data = data.map(lambda sample: decoded(sample["image"]), remove_columns=["image"])
    # One shard at a time: several become one for as many workers, and then there are too few for all of them.
    data = data.shuffle(seed=job.seed, buffer_size=BUFFER, max_buffer_input_shards=1)
    loader = job.loader(data, batch_size=job.batch_size)

    def epoch_of(epoch: int) -> Any:
        data.set_epoch(epoch)
        return loader

    return epoch_of


def _samples(job: Job) -> Iterator[bytes]:
    """The bytes of each sample, in their order."""
    for path in job.paths():
        if job.kind == TOKENS:
            with pa.memory_map(str(path)) as source:
                file = pa.ipc.open_file(source)
                for number in range(file.num_record_batches):
                    values = file.get_batch(number).column("tokens").flatten()
                    yield from map(bytes, values.to_numpy().reshape(-1, LENGTH))
        else:
            yield path.read_bytes()


def _shards(job: Job) -> Iterator[Iterator[bytes]]:
    """The samples by shard. Each must be used up before the next is asked for."""
    left = _samples(job)
    limit = _shard_bytes(job)

    def shard(first: bytes) -> Iterator[bytes]:
        yield first
        size_bytes = len(first)
        while size_bytes < limit and (sample := next(left, None)) is not None:
            size_bytes += len(sample)
            yield sample

    while (first := next(left, None)) is not None:
        yield shard(first)


def _shard_bytes(job: Job) -> int:
    whole = sum(path.stat().st_size for path in job.paths())
    return max(1, min(SHARD_BYTES, whole // LEAST_SHARDS))
