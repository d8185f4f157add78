"""Trains a small model from a dataset in Shoal, on any number of processes (docs/streaming.md, "A worked example").

    torchrun --nproc-per-node 2 train.py shoal://regression --steps 60 --checkpoint half.pt
    torchrun --nproc-per-node 4 train.py shoal://regression --steps 120 --resume half.pt

The samples of a step are the same whatever the number of processes, and the gradient is a mean over them. So is
the loss that is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal
import shoal.torch

GLOBAL_BATCH = 64


def main() -> None:
    """Train, and print a line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--steps", type=int, default=120, help="train up to this step")
    parser.add_argument("--checkpoint", type=Path, help="write one at the end")
    parser.add_argument("--resume", type=Path, help="go on from one")
    arguments = parser.parse_args()

    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    # In double precision the order in which processes add gradients up does not show in the digits that are printed.
    network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    model, step = DistributedDataParallel(network), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    # Rank and world size come from torch.distributed, by which the ranks also agree on snapshot and cluster map.
    stream = shoal.stream(arguments.url, batch_size=GLOBAL_BATCH // world_size, shuffle=True, seed=7, drop_last=True)
    if arguments.resume:
        saved = torch.load(arguments.resume)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stream.load_state_dict(saved["stream"])
        step = saved["step"]

    while step < arguments.steps:
        for batch in stream:  # what is left of the epoch; then the next one is current
            x = shoal.torch.tensor(batch["x"], (16,), dtype=torch.float64)
            y = shoal.torch.tensor(batch["y"])
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x).squeeze(1), y)
            loss.backward()
            optimizer.step()
            step += 1
            mean = loss.detach() / world_size
            torch.distributed.all_reduce(mean)
            if rank == 0:
                print(f"step {step} epoch {stream.epoch} loss {mean.item():.9f}", flush=True)
            if step == arguments.steps:
                break
    if arguments.checkpoint and rank == 0:  # the stream's state is the same on all ranks
        save = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        write(arguments.checkpoint, save | {"stream": stream.state_dict()})
    stream.close()
    torch.distributed.destroy_process_group()


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
