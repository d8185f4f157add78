"""What a contender's process is told, and what every contender's batches must be.

    tokens   {"tokens": (n, LENGTH) numbers}: a sample's first two numbers say which one it is
    images   {"pixels": (n, 3, CROP, CROP) bytes, "sum": (n,)}: a random crop of the picture, and the CRC of its file

The rule: nothing here, nor in what a peer's process imports, needs Shoal: another interpreter runs it.
"""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOKENS, IMAGES = "tokens", "images"
#: Numbers of a sequence.
LENGTH = 2048
#: Pixels of a picture's sides, and of the crop's.
SIDE, CROP = 256, 224
#: Samples that a buffer shuffles, where a loader shuffles by one.
BUFFER = 4096
#: From the number of an epoch to its batches.
Epoch = Callable[[int], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """Attributes:
    kind: `TOKENS` or `IMAGES`.
    files: the directory with the data as people write them: Arrow files of record batches, a folder of pictures.
    scratch: an empty directory of the contender's own, for another format of the same data.
    url, endpoint, socket: of the dataset that Shoal serves.
    """

    contender: str
    kind: str
    files: str
    scratch: str
    batch_size: int
    workers: int
    seed: int
    url: str
    endpoint: str
    socket: str

    def paths(self) -> list[Path]:
        return paths(Path(self.files))

    def loader(self, data: Any, **options: Any) -> Any:
        """A DataLoader as everybody gets it. Its workers stay from epoch to epoch."""
        import torch  # here, as below: the processes that write the data import this module and need none of it

        return torch.utils.data.DataLoader(
            data, num_workers=self.workers, persistent_workers=self.workers > 0, **options
        )


def paths(files: Path) -> list[Path]:
    """The data's files in their order."""
    return sorted(path for path in files.rglob("*") if path.is_file())


def decoded(data: Any) -> dict[str, Any]:
    """One picture's file as a sample: decoded and cropped as in training, and its CRC."""
    import torch

    image = Image.open(io.BytesIO(data)).convert("RGB")
    x, y = random.randint(0, SIDE - CROP), random.randint(0, SIDE - CROP)
    pixels = torch.from_numpy(np.array(image.crop((x, y, x + CROP, y + CROP)))).permute(2, 0, 1)
    return {"pixels": pixels, "sum": zlib.crc32(data)}


def collated(samples: Sequence[dict[str, Any]]) -> Any:
    """Samples as a batch: what a DataLoader does by itself, in shared memory where a worker does it."""
    import torch

    return torch.utils.data.default_collate(samples)


class Check:
    """That an epoch had each sample once.

    Args:
        expected: the CRC of each sample, by its number.
        is_whole: also compare the content of sequences; that of pictures always is.
    """

    def __init__(self, kind: str, expected: np.ndarray[Any, Any], *, is_whole: bool) -> None:
        self._kind, self._expected, self._is_whole = kind, expected, is_whole
        self._heads: list[Any] = []
        self._wrong = 0

    def take(self, batch: Any) -> None:
        """Note a batch: as little as that takes."""
        if self._kind == IMAGES:
            self._heads.append(batch["sum"])
            return
        self._heads.append(batch["tokens"][:, :2].clone())
        if self._is_whole:
            rows = batch["tokens"].numpy().astype(np.uint16)
            sums = [zlib.crc32(row) for row in rows]
            self._wrong += int((self._expected[_numbers(rows)] != np.array(sums)).sum())

    def end(self) -> int:
        """How many samples came. Raises ValueError where they are not those of the data, each once."""
        if self._kind == IMAGES:
            found, wanted = np.concatenate([np.asarray(head) for head in self._heads]), self._expected
        else:
            found = np.concatenate([_numbers(head.numpy()) for head in self._heads])
            wanted = np.arange(len(self._expected))
        if self._wrong or not np.array_equal(np.sort(found), np.sort(wanted)):
            raise ValueError(
                f"{len(found)} samples of {len(wanted)} came, {self._wrong} with other content, or not each once"
            )
        return len(found)


def _numbers(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    heads = rows[:, :2].astype(np.int64)
    return heads[:, 0] + (heads[:, 1] << 16)
