"""Sharded streaming: which samples a training run reads, in which order, and which rank reads them."""
