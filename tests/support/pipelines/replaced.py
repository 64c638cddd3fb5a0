"""Components of pipelines with optimised models in the place of their transformers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import CalicacheError

NAMES = ("transformer", "transformer_2")
MAKER = "get_dummy_components"


class Replacements:
    """What was replaced in a run of tests.

    Every second step is a CALIBRATE step at full rank: exact but for the order of sums. Changes of
    weights are followed, as someone has it who loads adapters.

    Attributes:
        calls: of optimised models so far.
        left: by the name of a test class, why its transformers are the plain ones.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.left: dict[str, str] = {}
        self._known: dict[tuple[str, ...], OptimizedModel] = {}
        self._count_calls()

    def replace_in(self, case: type) -> None:
        """Let the components that a test class makes for its pipelines have optimised models."""
        for owner in case.__mro__:
            make = vars(owner).get(MAKER)
            if inspect.isfunction(make) and not hasattr(make, "__wrapped__"):
                setattr(owner, MAKER, self._replacing(make))

    def _replacing(self, make: Any) -> Any:
        @functools.wraps(make)
        def get_dummy_components(test: Any, *args: Any, **options: Any) -> Any:
            components = make(test, *args, **options)
            if not isinstance(components, dict):
                return components
            with torch.random.fork_rng():
                return {**components, **self._optimised(test, components)}

        return get_dummy_components

    def _optimised(self, test: Any, components: Mapping[str, Any]) -> dict[str, nn.Module]:
        models = {name: components.get(name) for name in NAMES}
        plain = {
            name: model.eval()
            for name, model in models.items()
            if isinstance(model, nn.Module) and not isinstance(model, OptimizedModel)
        }
        kind = type(test).pipeline_class.__name__
        keys = {name: (kind, name, hash_weights(model)) for name, model in plain.items()}
        if not self._known.keys() >= set(keys.values()):
            plans = self._planned(test, components, plain)
            self._known |= {
                keys[name]: optimize(plain[name], plan, on_change="refactor")
                for name, plan in plans.items()
            }
        known = {name: self._known.get(key) for name, key in keys.items()}
        # A copy is what `optimize` would make, in a fraction of the time.
        return {name: copy.deepcopy(model) for name, model in known.items() if model is not None}

    def _planned(
        self, test: Any, components: Mapping[str, Any], plain: Mapping[str, nn.Module]
    ) -> dict[str, Plan]:
        """Plans from one run of the pipeline, on copies of its parts."""
        recordings = dict[str, Recording]()
        parts = copy.deepcopy(dict(components))
        try:
            pipe = type(test).pipeline_class(**parts)
            pipe.set_progress_bar_config(disable=True)
            with ExitStack() as stack:
                for name in plain:
                    recordings[name] = stack.enter_context(record(parts[name].eval()))
                pipe(**_inputs(test))
        except CalicacheError:
            raise
        except Exception as error:  # of a plain pipeline: its tests will meet it as well
            self.left[type(test).__qualname__] = repr(error)
            return {}
        return {
            name: Plan.from_trajectory(
                parts[name], recording, schedule=2, rank=4096, weighting="none", correct=False
            )
            for name, recording in recordings.items()
            if recording.calls
        }

    def _count_calls(self) -> None:
        forward = OptimizedModel.forward

        @functools.wraps(forward)
        def counted(model: OptimizedModel, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return forward(model, *args, **options)

        OptimizedModel.forward = counted  # type: ignore[method-assign]


def _inputs(test: Any) -> dict[str, Any]:
    """What the test class calls its pipeline with."""
    make = test.get_dummy_inputs
    inputs = make("cpu") if "device" in inspect.signature(make).parameters else make()
    assert isinstance(inputs, dict)
    return inputs
