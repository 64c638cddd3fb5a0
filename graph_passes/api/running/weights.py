"""Whether a model is still what it was optimised as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from calicache.graph_passes.common.errors import RunError

AGAIN = (
    "Optimise the model again, with plan.rebind(model) where its weights have changed, or optimise "
    "with on_change='refactor'."
)


class OnChange(StrEnum):
    """What happens when the weights have changed since the model was optimised."""

    REFUSE = "refuse"
    REFACTOR = "refactor"


@dataclass(frozen=True, slots=True)
class WeightVersions:
    """What a graph of a model is made of: its parameters, and the settings of its modules.

    A change of a parameter through `.data` is not counted.

    Attributes:
        parameters: each by its identity, and how often it has been written to.
        settings: of every module by name, a digest of its texts, switches and fractions, and of
            lists with such: the scale of an adapter, or whether it is off. Training mode is none.
    """

    parameters: tuple[tuple[int, int], ...]
    settings: Mapping[str, int]

    @staticmethod
    def of(model: nn.Module) -> WeightVersions:
        """Those of a model now."""
        parameters = tuple(
            (id(value), 0 if value.is_inference() else value._version)
            for value in model.parameters()
        )
        settings = {name: hash(_settings(module)) for name, module in model.named_modules()}
        return WeightVersions(parameters, settings)

    def refusal(self, model: nn.Module) -> RunError | None:
        """What to say of a model that has changed since; None where it has not."""
        now = WeightVersions.of(model)
        if now.parameters != self.parameters:
            named = zip(model.named_parameters(), now.parameters, strict=True)
            others = [name for (name, _), mine in named if mine not in self.parameters]
            return RunError(
                others[0] if others else "parameters",
                expected="the weights that the model was optimised with",
                got=f"{len(others)} others of {len(now.parameters)}",
                fix=AGAIN,
            )
        changed = [n for n, digest in now.settings.items() if digest != self.settings.get(n)]
        if not changed:
            return None
        return RunError(
            changed[0] or "model",
            expected="the settings that the model was optimised with",
            got=f"others in {len(changed)} of {len(now.settings)} modules",
            fix=AGAIN,
        )


_OWN = frozenset(vars(nn.Module()))  # hooks, tables, and whether it is in training mode


def _settings(module: nn.Module) -> str:
    """The settings of a module as text.

    Whole numbers alone are none: what a model keeps of the lengths that it has met is such.
    """
    named = []
    for name, value in vars(module).items():
        kind = type(value)
        if kind in (int, type(None)) or name in _OWN:
            continue
        if kind in (dict, list, tuple, set):
            parts = _parts(value)
            is_setting = parts is not None and ({*map(type, parts)} != {int} or not parts)
        else:
            is_setting = kind in (bool, float, str)
        if is_setting:
            named.append((name, value))
    return repr(named)


def _parts(value: object) -> list[object] | None:
    """The texts and numbers in lists, sets and dicts; None where something else is in them."""
    if value is None or type(value) in (bool, int, float, str):
        return [value]
    if type(value) not in (dict, list, tuple, set):
        return None
    inner = [*value, *value.values()] if type(value) is dict else [*value]  # type: ignore[misc]
    parts = [_parts(part) for part in inner]
    return None if None in parts else [leaf for part in parts for leaf in part or ()]
