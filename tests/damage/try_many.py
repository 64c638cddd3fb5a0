"""`make damage N=2000`: so many mutations over all formats, and every one that was not refused."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from damage.formats import FORMATS
from damage.trial import SECONDS, make_original, outcome_of


def main(count: int, first: int = 0) -> int:
    """Try the mutations of some seeds in turn over the formats; returns how many failed.

    Args:
        count: of seeds.
        first: of them.
    """
    torch.set_num_threads(1)  # a fork has none of the threads of its parent
    outcomes: Counter[tuple[str, str]] = Counter()
    seconds, peak = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        originals = [make_original(name, Path(folder)) for name in FORMATS]
        for seed in range(first, first + count):
            original = originals[seed % len(originals)]
            outcome = outcome_of(original, seed)
            seconds, peak = max(seconds, outcome.seconds), max(peak, outcome.peak)
            right = outcome.right and outcome.seconds <= SECONDS
            outcomes[outcome.change, outcome.words if right else "FAILED"] += 1
            if not right:
                print(f"FAILED {original.format} {seed} {outcome}", flush=True)
    for (change, words), number in sorted(outcomes.items()):
        print(f"{number:6d}  {change}: {words}")
    failed = sum(number for (_, words), number in outcomes.items() if words == "FAILED")
    print(f"{count} mutations, {failed} failed; at most {seconds:.2f} s, {peak / 2**20:.0f} MiB")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(*(int(word) for word in sys.argv[1:]))))
