"""Linear layers of which a process holds a part: tensor parallelism, written out for tracing.

`parallelize_module` of torch makes weights DTensors, which torch.export does not take. For the time
of a capture such a layer is one over its own part of the weight, with the collective operation in
the open: a layer that is split by rows of W makes its own channels of y, one that is split by
columns a part of every sum. A graph of it is of this process, and all have the same nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calicache.graph_passes.common.errors import CaptureError, PlanError
from calicache.graph_passes.common.ranks import Ranks

collectives = torch.ops._c10d_functional
ROWS, COLUMNS = 0, 1
STYLES = {"ColwiseParallel": ROWS, "RowwiseParallel": COLUMNS}
ANY_TOKENS = ("ulysses_anything", "ring_anything")
WHOLE_MODEL = (
    "Plan with REFRESH and FORECAST steps alone, which run the model whole, or split its linear "
    "layers by ColwiseParallel() and RowwiseParallel() as they are by default."
)


@dataclass(frozen=True, slots=True)
class WeightShard:
    """Which part of a weight W (out, in) a process holds.

    Attributes:
        dim: ROWS for channels of y, COLUMNS for channels of x.
        rank: of the process among those that share W.
        count: how many share it, in equal parts.
        group: name of their process group.
    """

    dim: int
    rank: int
    count: int
    group: str

    def part(self, value: Tensor, dim: int) -> Tensor:
        """The part of a whole tensor that is of this process, in memory of its own."""
        return value.chunk(self.count, dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def whole(self, weight: Tensor) -> Tensor:
        """All of W, from the parts of all processes, which have to ask at the same time."""
        turned = weight.detach() if self.dim == COLUMNS else weight.detach().T
        gathered = gather_channels(turned, self.count, self.group)
        return gathered if self.dim == COLUMNS else gathered.T


def gather_channels(value: Tensor, count: int, group: str) -> Tensor:
    """Channels of all processes side by side, by rank.

    Args:
        value: (..., C).
        count: how many processes there are.
        group: name of their group.

    Returns:
        (..., count * C).
    """
    pile = collectives.all_gather_into_tensor(value.contiguous(), count, group)
    pile = collectives.wait_tensor(pile)  # (count * B, ..., C)
    beside: Tensor = pile.unflatten(0, (count, value.shape[0])).movedim(0, -2).flatten(-2)
    return beside


def add_up(value: Tensor, group: str) -> Tensor:
    """The sum of a value over all processes of a group."""
    total: Tensor = collectives.wait_tensor(
        collectives.all_reduce(value.contiguous(), "sum", group)
    )
    return total


def arrived(value: Any) -> Any:
    """A tensor that other processes have sent, not one that is still on its way."""
    return value.wait() if hasattr(value, "trigger_wait") else value


class SplitLinear(nn.Module):
    """A linear layer over its own part of a weight.

    Args:
        layer: whose weight and bias are DTensors.
        shard: which part it has.
        gathers: of a layer with own rows of W: whether all channels of y are wanted.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, shard: WeightShard, *, gathers: bool) -> None:
        super().__init__()
        self.shard, self.gathers = shard, gathers
        for name, value in layer._parameters.items():
            own = None if value is None else nn.Parameter(_local(value), requires_grad=False)
            self.register_parameter(name, own)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Own channels of y, or all of them."""
        shard = self.shard
        if shard.dim == ROWS:
            y = F.linear(x, self.weight, self.bias)
            return gather_channels(y, shard.count, shard.group) if self.gathers else y
        total = add_up(F.linear(x, self.weight), shard.group)
        return total if self.bias is None else total + self.bias


def split_layers(model: nn.Module) -> tuple[nn.Module, dict[str, WeightShard]]:
    """A copy over the same weights, in which split layers are written out; and the weights' parts.

    The model itself where none of its weights is a DTensor.

    Raises:
        CaptureError: a weight is a DTensor in a way that is not written out here.
    """
    if not any(map(is_split, (*model.parameters(), *model.buffers()))):
        return model, {}
    if any(base.__name__ == "FSDPModule" for base in _classes(model)):
        raise _not_split("model", "weights that fully_shard of FSDP spreads over processes")
    shards: dict[str, WeightShard] = {}
    return _written_out(model, "", shards, {}), shards


def groups_of(graph: fx.Graph) -> set[str]:
    """Names of the process groups that a graph talks to."""
    nodes = (n for n in graph.nodes if getattr(n.target, "namespace", "") == "_c10d_functional")
    return {
        str(node.args[-1]) for node in nodes if node.target is not collectives.wait_tensor.default
    }


def check_tokens(model: nn.Module) -> None:
    """Refuse context parallelism whose processes ask one another how many tokens they have.

    Raises:
        CaptureError: sizes in a graph cannot depend on the answers.
    """
    for config in _token_configs(model):
        ways = [way for way in ANY_TOKENS if getattr(config, way, False)]
        if ways:
            raise CaptureError(
                type(model).__name__,
                expected="tokens of which every process has the same number, known beforehand",
                got=f"context parallelism with {ways[0]}, where they ask one another",
                fix=f"Leave {ways[0]} out, and have a number of tokens that the processes divide; "
                "or plan with REFRESH and FORECAST steps alone, which run the model whole.",
            )


def check_split(model: nn.Module, ranks: Ranks, *, searches: bool) -> None:
    """Refuse what processes cannot do together that already share each call of a model.

    Args:
        model: that is planned for.
        ranks: the processes that are to share recorded runs.
        searches: whether it is a search that looks inside the model.

    Raises:
        PlanError: they cannot; with what to do.
    """
    if not (searches or ranks.size > 1) or not _is_shared(model):
        return
    raise PlanError(
        "search" if searches else "group",
        expected="a model that each process runs by itself",
        got="one that several share: its weights or its tokens are split over them",
        fix="Search before it is split: the plan is of its weights, and holds; or search with "
        "modes=('FORECAST',), or plan with Plan.from_trajectory and a schedule."
        if searches
        else "Leave the group out: every process plans alike then.",
    )


def _is_shared(model: nn.Module) -> bool:
    """Whether its weights are DTensors, or diffusers splits its tokens."""
    return any(_token_configs(model)) or any(map(is_split, model.parameters()))


def _token_configs(model: nn.Module) -> Iterator[Any]:
    """How diffusers splits tokens, for every module that it has told."""
    configs = (getattr(module, "_parallel_config", None) for module in model.modules())
    tokens = (getattr(config, "context_parallel_config", None) for config in configs)
    return (config for config in tokens if config)


def _classes(model: nn.Module) -> Iterator[type]:
    return (base for module in model.modules() for base in type(module).__mro__)


def is_split(value: object) -> bool:
    """Whether a tensor is a DTensor, of which a process has a part."""
    return hasattr(value, "full_tensor")


def _local(value: Tensor) -> Tensor:
    with torch.no_grad():  # the part itself, whose memory the DTensor shares
        own: Tensor = value.to_local()  # type: ignore[attr-defined]
    return own


def _written_out(
    module: nn.Module, path: str, shards: dict[str, WeightShard], done: dict[int, nn.Module]
) -> nn.Module:
    """A copy of a module with all that is in it; a module that is in two places is copied once."""
    if id(module) in done:
        return done[id(module)]
    own = (*module._parameters.values(), *module._buffers.values())
    if any(map(is_split, own)):
        copied = _split_linear(module, path)
        shards[f"{path}.weight"] = copied.shard
        done[id(module)] = copied
        return copied
    done[id(module)] = shallow = copy.copy(module)
    shallow._modules = {
        name: None
        if child is None
        else _written_out(child, f"{path}.{name}" if path else name, shards, done)
        for name, child in module._modules.items()
    }
    return shallow


def _split_linear(module: nn.Module, path: str) -> SplitLinear:
    """A layer that `ColwiseParallel` or `RowwiseParallel` has split, written out.

    Raises:
        CaptureError: it is none, or has other layouts than those by default.
    """
    dim, layouts = _style(module, path)
    weight: Any = module.weight
    mesh = weight.device_mesh
    placed = [*weight.placements]
    if len(placed) != 1 or not placed[0].is_shard(dim):
        raise _not_split(path, f"a weight that lies as {weight.placements}")
    if weight.shape[dim] % mesh.size():
        parts = f"{weight.shape[dim]} {'columns' if dim else 'rows'} of W"
        raise _not_split(path, f"{parts} over {mesh.size()} processes")
    before, after, is_local = layouts
    wanted = (before.is_replicate(), after.is_shard(-1) or after.is_replicate())
    if dim == COLUMNS:
        wanted = (before.is_shard(-1), after.is_replicate())
    if not all(wanted) or not is_local:
        raise _not_split(path, f"{before} to {after}{'' if is_local else ', as DTensors'}")
    shard = WeightShard(dim, mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    return SplitLinear(module, shard, gathers=dim == ROWS and after.is_replicate())


def _style(module: nn.Module, path: str) -> tuple[int, tuple[Any, Any, bool]]:
    """Whether a layer is split by rows or columns of W; layouts before and after it, and the form.

    They are in what `distribute_module` has hooked to it, and nowhere else.

    Raises:
        CaptureError: nothing of the kind is.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    calls = [call for call in map(_bound, hooks) if call]
    names = [getattr(call.func, "__qualname__", "") for call in calls]
    for style, dim in STYLES.items():
        if names == [f"{style}._prepare_input_fn", f"{style}._prepare_output_fn"]:
            (before,), (after,) = calls[0].args[0], calls[1].args[0]
            if isinstance(module, nn.Linear) and len(hooks) == len(calls):
                return dim, (before, after, calls[1].args[1])
    raise _not_split(path, f"a {type(module).__name__} that is split in another way")


def _bound(hook: object) -> partial[Any] | None:
    """What a hook of `distribute_module` calls."""
    values = (cell.cell_contents for cell in getattr(hook, "__closure__", None) or ())
    return next((value for value in values if isinstance(value, partial)), None)


def _not_split(path: str, got: str) -> CaptureError:
    return CaptureError(
        path or "model",
        expected="weights that are whole in every process, or linear layers that tensor "
        "parallelism splits evenly by rows or columns",
        got=got,
        fix=WHOLE_MODEL,
    )
