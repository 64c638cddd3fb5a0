"""Whether a manifest agrees with itself, and with the models whose artifact it describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

from calicache.export.artifact.manifest import (
    GRAPHS_FILE,
    Layout,
    Manifest,
    ModeRecord,
    model_file,
)
from calicache.export.artifact.model_file import Form, ModelInterface, read_interface
from calicache.export.artifact.names import (
    GUIDANCE_INPUT,
    LATENTS_OUTPUT,
    STEP_INPUT,
    next_name,
)
from calicache.graph_passes.common.disk.bounds import MAX_WEIGHT
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import MAX_ORDER


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest whose parts do not belong together.

    Raises:
        ValueError, RecordError: it is one.
    """
    modes = [record.mode for record in manifest.modes]
    inputs = [spec.name for spec in manifest.inputs]
    caches = [spec.name for spec in manifest.caches]
    _forms((*manifest.inputs, *manifest.caches))  # refuses an unknown dtype
    slots = {name for names in cache_slots(manifest).values() for name in names}
    reads = {name for record in manifest.modes for name in record.reads}
    table, steps = manifest.output_weights, len(manifest.schedule)
    front = manifest.front
    checks = {
        "schedule": manifest.schedule[:1] == (StepMode.REFRESH,),
        "modes": len(set(modes)) == len(modes) and set(manifest.schedule) <= set(modes),
        "order": manifest.order <= MAX_ORDER,
        "history": manifest.history <= MAX_ORDER + 1,
        "inputs": len(set(inputs)) == len(inputs) > 0,
        "outputs": len(set(manifest.outputs)) == len(manifest.outputs) > 0,
        "caches": len(set(caches)) == len(caches) and len(slots) == len(caches) * manifest.history,
        "reads": reads <= slots,
        "writes": all(_are_written(record, caches) for record in manifest.modes),
        "fixed": set(manifest.fixed) <= set(inputs),
        "files": len({record.name for record in manifest.files}) == len(manifest.files),
        "sampler": (manifest.sampler is not None) == (manifest.layout is Layout.SAMPLER),
        "plain_macs": manifest.plain_macs > 0,
        "output_weights": table is None or _is_table(table, steps, manifest.order),
        "open_sizes": _are_open(manifest),
        "front": front is None or 0 <= front.choice < len(front.points),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{wrong[0]} that do not belong to the rest")


def check_models(manifest: Manifest, folder: Path) -> None:
    """Refuse models that do not take and give what a manifest says, or refer to other files.

    Args:
        manifest: that agrees with itself.
        folder: with the files that it lists, unchanged.

    Raises:
        ValueError: a name, shape or dtype is another; a file that a model refers to is not
            listed; or one is listed that none refers to.
    """
    listed = {record.name for record in manifest.files} - {GRAPHS_FILE}
    files = {model_file(manifest.layout, mode): mode for mode in manifest.schedule}
    if not set(files) <= listed:
        raise ValueError(f"the manifest has no entry for {min(set(files) - listed)}")
    used = {model_file(manifest.layout, record.mode) for record in manifest.modes}
    for name in sorted(used & listed):
        model = read_interface(folder / name)
        if not model.external <= listed:
            raise ValueError(
                f"{name} refers to {min(model.external - listed)}, which is not listed"
            )
        for weights in model.external:
            _check_place(folder / name, folder / weights)
        used |= model.external
        modes = [r for r in manifest.modes if model_file(manifest.layout, r.mode) == name]
        _check_inputs(manifest, name, model, {read for r in modes for read in r.reads})
        if len(modes) > 1 and manifest.layout is Layout.STEP:
            _check_branches(manifest, name, model)
        _check_outputs(manifest, name, model, {cache for r in modes for cache in r.writes})
    if listed - used:
        raise ValueError(f"no model refers to {min(listed - used)}")


def _check_place(model: Path, weights: Path) -> None:
    """Refuse links that ONNX Runtime does not follow: weights outside the model's own folder."""
    allowed = {model.parent.resolve(), model.resolve().parent}
    if not any(weights.resolve().is_relative_to(folder) for folder in allowed):
        raise ValueError(
            f"{weights.name} is a link to a folder that {model.name} is not in, and ONNX Runtime "
            "follows none: copy what it leads to (cp -L), or link both to one folder, as "
            "huggingface_hub does"
        )


def _check_inputs(manifest: Manifest, name: str, model: ModelInterface, reads: Set[str]) -> None:
    expected: dict[str, Form] = {}
    sampler = manifest.sampler
    if sampler is not None:
        expected = _forms((sampler.noise, *sampler.inputs))
        if sampler.guidance is not None:
            expected[GUIDANCE_INPUT] = ("float32", ())
    else:
        expected = {**_forms(manifest.inputs), STEP_INPUT: ("int64", ())}
        caches = _forms(manifest.caches)
        for cache, slots in cache_slots(manifest).items():
            read = [slot for slot in slots if slot in reads or manifest.layout is Layout.STEP]
            expected |= dict.fromkeys(read, caches[cache])
        missing = reads - set(model.inputs)
        if missing:
            raise ValueError(f"{name} does not take {min(missing)}")
    _check_forms(f"{name} takes", model.inputs, expected)


def _check_branches(manifest: Manifest, name: str, model: ModelInterface) -> None:
    """Refuse a mode whose branch is missing."""
    for record in manifest.modes:
        branch = record.mode.name.lower()
        if branch not in model.branches:
            raise ValueError(f"{name} has no branch {branch}")


def _check_outputs(manifest: Manifest, name: str, model: ModelInterface, writes: Set[str]) -> None:
    if manifest.sampler is not None:
        noise = _forms([manifest.sampler.noise])
        expected = {LATENTS_OUTPUT: noise[manifest.sampler.noise.name]}
        names = {LATENTS_OUTPUT}
    else:
        caches = _forms(spec for spec in manifest.caches if spec.name in writes)
        expected = {next_name(cache): form for cache, form in caches.items()}
        names = {*manifest.outputs, *expected}
    if set(model.outputs) != names:
        raise ValueError(f"{name} gives other outputs: {min(set(model.outputs) ^ names)}")
    forms = {output: form for output, form in model.outputs.items() if output in expected}
    _check_forms(f"{name} gives", forms, expected)


def _check_forms(words: str, forms: Mapping[str, Form], expected: Mapping[str, Form]) -> None:
    for name, (dtype, shape) in forms.items():
        if name not in expected:
            raise ValueError(f"{words} {name}, which the manifest does not have")
        wanted, sizes = expected[name]
        if dtype != wanted or not _fits(shape, sizes):
            raise ValueError(f"{words} {name} as {dtype} {shape}, not as {wanted} {sizes}")


def _fits(shape: tuple[int | None, ...] | None, wanted: tuple[int | None, ...] | None) -> bool:
    """Whether a shape with open sizes can be the one that is wanted."""
    if shape is None or wanted is None:
        return True
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(size in (None, other) for size, other in pairs)


def _forms(specs: Iterable[TensorSpec]) -> dict[str, Form]:
    """As the graph has them: complex values are pairs in a last dimension."""
    return {spec.name: _form(spec) for spec in specs}


def _form(spec: TensorSpec) -> Form:
    dtype = spec.torch_dtype
    if not dtype.is_complex:
        return spec.dtype, spec.shape
    return str(dtype.to_real()).removeprefix("torch."), (*spec.shape, 2)


def cache_slots(manifest: Manifest) -> dict[str, list[str]]:
    """Names of the kept values that a step can read, newest refresh first, by cache."""
    history = range(min(manifest.history, MAX_ORDER + 1))
    return {
        cache.name: [slot_name(cache.name, back) for back in history] for cache in manifest.caches
    }


def _are_written(record: ModeRecord, caches: Sequence[str]) -> bool:
    """Whether a mode adds to caches that there are, REFRESH to all of them."""
    written = record.writes
    if record.mode is StepMode.REFRESH:
        return [*written] == [*caches]
    return set(written) <= set(caches) and len(set(written)) == len(written)


def _are_open(manifest: Manifest) -> bool:
    """Whether the open sizes follow from what a caller hands over, and fit the recorded ones."""
    sampler = manifest.sampler
    specs = (*manifest.inputs, *manifest.caches, *((sampler.noise,) if sampler else ()))
    ranks = {spec.name: len(spec.shape) for spec in specs}
    opened = [(ranks.get(name, 0), size) for name, o in manifest.open_sizes.items() for size in o]
    if any(size.dimension >= rank or 0 in size.formula.factors.values() for rank, size in opened):
        return False
    sizes = manifest.sizes_of({})
    known = all(size.formula.axes <= sizes.keys() for _, size in opened)
    return known and all(manifest.sized(spec, sizes) == spec for spec in specs)


def _is_table(table: tuple[tuple[float, ...], ...], steps: int, order: int) -> bool:
    """Whether every step has its row of bounded weights."""
    rows = len(table) == steps and all(len(row) in (order + 2, order + 3) for row in table)
    return rows and all(abs(value) <= MAX_WEIGHT for row in table for value in row)
