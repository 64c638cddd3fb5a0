"""The processes that share a piece of work, and what they tell one another.

Work is shared by items, such as recorded runs: item k is done by rank k modulo their number, and
results are put in the order of the items before anything is made of them. So a result does not
depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from calicache.graph_passes.common.errors import CalicacheError, RankError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a group; by default this one alone.

    Every process of the group calls the same methods in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many processes there are.
        group: of torch.distributed; None for its default one, which is not to be held: where
            something outlives its end, processes abort.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    @staticmethod
    def of(group: distributed.ProcessGroup | None) -> Ranks:
        """The processes of a group; this one alone for None."""
        if group is None:
            return ALONE
        own = None if group is distributed.group.WORLD else group
        return Ranks(group.rank(), group.size(), own)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process: every `size`-th, from its rank on."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def gather(self, own: Result) -> list[Result]:
        """What every process gives, by rank.

        Raises:
            RankError: a process is gone.
        """
        if self.size == 1:
            return [own]
        values: list[Any] = [None] * self.size
        self._talk(partial(distributed.all_gather_object, values, own, self.group))
        return values

    def in_order(self, own: Sequence[Result]) -> list[Result]:
        """Results of all items in their order, from those of every process's `share`.

        Raises:
            RankError: a process is gone.
        """
        by_rank = self.gather(own)
        count = sum(map(len, by_rank))
        return [by_rank[k % self.size][k // self.size] for k in range(count)]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The function of every item, each computed by one process.

        Raises:
            CalicacheError: what the function raised first, in the order of the items; every
                process raises the same.
            RankError: a process is gone.
        """
        if self.size == 1:
            return [function(item) for item in items]
        results = self.in_order([_outcome(function, item) for item in self.share(items)])
        return [_value(result) for result in results]

    def first(self, compute: Callable[[], Result]) -> Result:
        """What the first process computes; the others wait for it.

        Raises:
            CalicacheError: what was raised there; every process raises the same.
            RankError: a process is gone.
        """
        if self.size == 1:
            return compute()
        values: list[Any] = [_outcome(lambda _: compute(), None) if self.rank == 0 else None]
        share = partial(distributed.broadcast_object_list, values, group=self.group, group_src=0)
        self._talk(share)
        value: Result = _value(values[0])
        return value

    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes.

        Args:
            value: float64, of one shape everywhere.

        Raises:
            RankError: a process is gone.
        """
        if self.size == 1:
            return value
        # NCCL has no tensors on the CPU, gloo has them everywhere.
        kinds = distributed.get_backend_config(self.group)
        place = value.device if value.device.type in kinds else torch.device("cuda")
        total = value.to(place, copy=True)
        self._talk(partial(distributed.all_reduce, total, group=self.group))
        return total.to(value.device)

    def check_alike(self, where: str, value: object, fix: str) -> None:
        """Refuse to go on where the processes do not have the same.

        Args:
            where: what is compared.
            value: of this process, as short text.
            fix: what to do about it.

        Raises:
            RankError: they differ, or a process is gone.
        """
        values = self.gather(str(value))
        other = next((k for k, text in enumerate(values) if text != values[0]), None)
        if other is not None:
            raise RankError(
                where,
                expected=f"the same in all {self.size} processes",
                got=f"{values[0]} at rank 0, {values[other]} at rank {other}",
                fix=fix,
            )

    def _talk(self, talk: Callable[[], Any]) -> None:
        try:
            talk()
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise RankError(
                f"rank {self.rank} of {self.size}",
                expected="an answer from the other processes",
                got=lines[0] if lines else type(error).__name__,
                fix="One of them has ended: see its own error, or torchrun's summary, which names "
                "it. Start again: a search or an evaluation with a folder goes on from there.",
            ) from error


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class _Failure:
    error: CalicacheError


def _outcome(function: Callable[[Item], Result], item: Item) -> Result | _Failure:
    try:
        return function(item)
    except CalicacheError as error:
        return _Failure(error)


def _value(outcome: Any) -> Any:
    if isinstance(outcome, _Failure):
        raise outcome.error
    return outcome
