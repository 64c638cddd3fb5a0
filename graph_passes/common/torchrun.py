"""The group of processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from calicache.graph_passes.common.ranks import ALONE, Ranks

PATIENCE = timedelta(seconds=20)  # for a process that has said it will tell
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
    store, rank, size = _meeting_place(TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        yield Ranks.of(distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def tell_once(text: str, tell: Callable[[str], None]) -> None:
    """Tell what all processes of torchrun may have to tell, once on every machine.

    The first one to come tells at once, so that nothing is lost that one process alone has to say.
    The others wait until it has told: when one ends, torchrun ends them all.

    Args:
        text: of this process.
        tell: what shows it.
    """
    # Rank 0 may be gone with its own store; only that of torchrun's agent outlives the processes.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        tell(text)
        return
    machine = os.environ.get("GROUP_RANK", "0")
    key = f"told on {machine}/{sha256(text.encode()).hexdigest()}"
    try:
        store, _, _ = _meeting_place(PATIENCE)
        if store.add(key, 1) > 1:
            store.wait([f"{key}/done"], PATIENCE)
            return
    except RuntimeError:  # nobody answers
        tell(text)
        return
    tell(text)
    with suppress(RuntimeError):
        store.set(f"{key}/done", "")


def _meeting_place(patience: timedelta) -> tuple[Store, int, int]:
    """A store that the processes share, the rank of this one, and how many they are."""
    store, rank, size = next(rendezvous("env://", timeout=patience))
    # Processes that are started again share the store with those before them, whose addresses
    # they must not find in it.
    return PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store), rank, size
