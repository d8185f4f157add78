"""Streams as torch's data sets, and tensors from Arrow columns.

    shoal.torch.IterableStream(url, batch_size=256, shuffle=True)   batches, with any number of DataLoader workers
    shoal.torch.Samples(url)                                        single samples by number
    shoal.torch.tensor(batch["pixels"], (3, 224, 224))              a column as a tensor
    DataLoader(data, collate_fn=shoal.torch.collate)                batches of samples, without new memory for each

Needs PyTorch, which is imported with this package and not by ``import shoal``.
"""

from shoal.torch.handover import collate
from shoal.torch.iterable import IterableStream, merged
from shoal.torch.samples import Samples
from shoal.torch.tensors import tensor, tensors

__all__ = ["IterableStream", "Samples", "collate", "merged", "tensor", "tensors"]
