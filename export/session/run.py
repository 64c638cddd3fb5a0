"""All that one running denoising of a session changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from calicache.export.artifact.manifest import Manifest
from calicache.export.artifact.open_sizes import Sizes
from calicache.export.session.caches import Caches, empty_caches
from calicache.export.session.inputs import InputBuffers
from calicache.export.session.runtime import OrtValue
from calicache.graph_passes.settings.choices import StepMode


@dataclass(slots=True)
class SessionRun:
    """The running denoising of a session.

    Attributes:
        kept: caches by call of a step.
        inputs: buffers on the device.
        outputs: where the outputs of every mode go, in the layout `pair`.
        sizes: those that the artifact leaves open, once a step has told them.
    """

    kept: list[Caches]
    inputs: InputBuffers
    outputs: dict[StepMode, dict[str, OrtValue]] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)

    @staticmethod
    def empty(manifest: Manifest, device: str) -> SessionRun:
        """Nothing is kept yet: the first step must be a REFRESH."""
        calls = range(manifest.calls_per_step)
        return SessionRun([empty_caches(manifest, device) for _ in calls], InputBuffers(device))
