"""What a plan is tied to: a checkpoint, a form of call, and how the inputs behave."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from calicache.graph_passes.common.disk.bounds import Digest
from calicache.graph_passes.common.disk.hashing import digest, hash_weights
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.recording.grid import Grid, grid_of
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.reads import (
    DIFFERENT,
    NOTHING,
    find_reads,
    read_answers,
    read_call,
)
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import (
    CallSignature,
    FlatCall,
    name_pattern,
)
from calicache.graph_passes.recording.step_calls import batch_signature, batch_size
from calicache.graph_passes.recording.timestep import Timestep, calls_of


@dataclass(frozen=True, slots=True)
class Binding:
    """What a plan is tied to.

    Attributes:
        signature: form of the model's calls.
        dependence: class of every tensor argument.
        timestep: the argument that counts the denoising down, or None.
        weights_hash: of the checkpoint.
        reads: what the model reads off its tensors in every call, from `find_reads`.
        run_values: where it reads anything, digests of the recorded values of every argument that
            stays the same over a run: the graph is made for what some of them decide.
        grid: the recorded timesteps, and how far the latents move between them.

    Raises:
        PlanError: it names a tensor that the calls do not have.
    """

    signature: CallSignature
    dependence: dict[str, Dependence]
    timestep: Timestep | None
    weights_hash: str
    grid: Grid
    reads: str = NOTHING
    run_values: dict[str, tuple[Digest, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_answers(self.reads)
        names = {spec.name for spec in self.signature.tensors}
        others = [set(self.dependence) ^ names, set(self.run_values) - names]
        others.append({self.timestep.name} - names if self.timestep else set())
        for odd in filter(None, others):
            raise PlanError(
                "binding",
                expected=f"the tensors of the call: {', '.join(sorted(names))}",
                got=min(odd),
                fix="Make the plan again from the recording.",
            )

    @property
    def calls(self) -> int:
        """Calls of the model in a step."""
        return calls_of(self.timestep)

    def with_signature(self, signature: CallSignature) -> Binding:
        """The same for calls of another form.

        Raises:
            RunError: the form differs in more than sizes, constants and lengths of lists.
        """
        classes = self.classes_of(signature)
        values = {name: known for name, known in self.run_values.items() if name in classes}
        return replace(self, signature=signature, dependence=classes, run_values=values)

    def classes_of(self, signature: CallSignature) -> dict[str, Dependence]:
        """Class of every tensor of another form of call.

        A further tensor of a list has the class of the one that changes most often.

        Raises:
            RunError: the form differs in more than sizes, constants and lengths of lists.
        """
        if signature == self.signature:
            return self.dependence
        self.signature.check_kin(signature)
        kinds: dict[str, Dependence] = {}
        for name, kind in self.dependence.items():
            pattern = name_pattern(name)
            kinds[pattern] = max(kind, kinds.get(pattern, kind))
        return {
            spec.name: self.dependence.get(spec.name, kinds[name_pattern(spec.name)])
            for spec in signature.tensors
        }

    def for_call(self, model: nn.Module, call: FlatCall) -> Binding:
        """The same for calls of another form: other sizes, constants, or lengths of lists.

        Where the recorded calls read off values of their arguments, this one is run to see what
        it reads.

        Raises:
            RunError: the call differs in more than that.
        """
        signature = call.signature()
        changed = replace(self.with_signature(signature), run_values={})
        if self.reads in (NOTHING, DIFFERENT):
            return changed
        names = (name for name, kind in changed.dependence.items() if kind is Dependence.RUN)
        return replace(
            changed,
            reads=read_call(model, signature, call.tensors),
            run_values={name: (digest(call.tensors[name]),) for name in names},
        )

    def by_step(self) -> Binding:
        """The same with all calls of a step in one; this one where a step has one call."""
        if self.timestep is None or self.calls == 1:
            return self
        batch = batch_size(self.signature, self.dependence)
        signature = batch_signature(self.signature, self.calls, batch)
        return replace(self, signature=signature, timestep=replace(self.timestep, calls=1))


def bind(model: nn.Module, recording: Recording) -> Binding:
    """Tie a plan to a model and to what its sampler was seen to do.

    Args:
        model: the one that was recorded; may be on the meta device.
        recording: one run or more.

    Raises:
        RecordError: nothing was recorded.
        DependenceError: the inputs do not tell what changes over the steps.
    """
    reads = find_reads(model, recording)
    names = [name for name, kind in recording.dependence.items() if kind is Dependence.RUN]
    if reads in (NOTHING, DIFFERENT):
        names = []
    firsts = [run[0] for run in recording.runs]
    return Binding(
        signature=recording.signature,
        dependence=dict(recording.dependence),
        timestep=recording.timestep,
        weights_hash=hash_weights(model),
        grid=grid_of(recording),
        reads=reads,
        run_values={
            name: tuple(dict.fromkeys(digest(call[name]) for call in firsts)) for name in names
        },
    )
