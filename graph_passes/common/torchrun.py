"""The group of processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from calicache.graph_passes.common.ranks import ALONE, Ranks

TIMEOUT = timedelta(days=1)  # one step of a large model takes long; torchrun sees who has died


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
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # Processes that are started again share the store with those before them, whose addresses
    # they must not find in it.
    again = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    distributed.init_process_group(
        backend, store=again, rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        yield Ranks.of(distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
