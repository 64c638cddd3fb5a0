"""The group of processes that torchrun starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from calicache.graph_passes.common.ranks import ALONE, Ranks


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started, as one group; this one alone without torchrun.

    Every process has a GPU of its own where there are some, by its local rank.

    Yields:
        The ranks; the group ends with the block.
    """
    if not distributed.is_torchelastic_launched():
        yield ALONE
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(distributed.get_node_local_rank() % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    try:
        yield Ranks.of(distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
