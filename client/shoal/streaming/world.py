"""The ranks of a job: how many there are, which one this is, and what they must agree on before they read.

Ranks plan for themselves, so all must plan with the same snapshot, the same cluster map and the same settings: rank 0's
count, and a rank whose settings differ stops the job. They meet through one all-gather of a few hundred bytes, that of
``torch.distributed`` or one that is given.

The rule: what was not agreed on is not used. Without a way to meet, each rank has the snapshot that it opened, and
samples go to ranks without regard to where they lie.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.errors import InvalidRequest

#: Takes this rank's bytes, returns those of all ranks in their order.
Gather = Callable[[bytes], list[bytes]]


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a job.

    Attributes:
        rank: this one's, from 0.
        size: how many there are.
        gather: how they meet; None: they cannot.
    """

    rank: int
    size: int
    gather: Gather | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise InvalidRequest(f"rank {self.rank} of {self.size} is none: ranks are counted from 0")

    @classmethod
    def find(cls, rank: int | None, size: int | None, gather: Gather | None) -> World:
        """What is given; else what ``torch.distributed`` says where it is initialised; else ``RANK``, ``WORLD_SIZE``.

        Raises:
            InvalidRequest: only one of rank and size is given, or they make no sense.
        """
        if (rank is None) != (size is None):
            raise InvalidRequest("give both rank and world_size, or neither")
        if rank is not None and size is not None:
            return cls(rank, size, gather)
        distributed = sys.modules.get("torch.distributed")  # whoever uses it has imported it
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), gather or _torch_gather)
        try:
            # As torchrun sets them.
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), gather)
        except ValueError as error:
            raise InvalidRequest(f"RANK or WORLD_SIZE in the environment is no number ({error}): correct it") from error

    def agree(self, settings: dict[str, Any], offered: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Meet the other ranks: what each offered, rank 0's first; None where they cannot meet.

        Args:
            settings: must be the same on all ranks.

        Raises:
            InvalidRequest: they are not; the message says which differ, and where.
        """
        if self.size == 1:
            return [offered]
        if self.gather is None:
            return None
        said = [json.loads(each) for each in self.gather(json.dumps([settings, offered]).encode())]
        if len(said) != self.size:
            raise InvalidRequest(f"{len(said)} ranks met where world_size is {self.size}: check what gather returns")
        first = said[0][0]
        for rank, (theirs, _) in enumerate(said):
            wrong = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
            if wrong:
                name = wrong[0]
                raise InvalidRequest(
                    f"rank 0 streams with {name}={first.get(name)!r} and rank {rank} with "
                    f"{name}={theirs.get(name)!r}: all ranks must open a stream with the same arguments, in the "
                    "same order"
                )
        return [offer for _, offer in said]


def _torch_gather(mine: bytes) -> list[bytes]:
    import torch.distributed

    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found
