"""`make fuzz N=5000`: so many random cases, what became of them, and every failure."""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from contextlib import suppress

from support.artifacts import quick_exports

from random_models.cases import case_of, outcome_of


def main(count: int, first: int) -> int:
    """Try the cases of some seeds; returns how many failed.

    Args:
        count: of seeds.
        first: of them.
    """
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    start = time.perf_counter()
    with suppress(KeyboardInterrupt), quick_exports():  # stopped, it tells what was found so far
        for seed in range(first, first + count):
            try:
                outcome = outcome_of(case_of(seed))
            except Exception as error:  # told, and the search goes on
                place = traceback.extract_tb(error.__traceback__)[-1]
                failures[f"{type(error).__name__} in {place.name}"] += 1
                print(f"FAILED {seed} {case_of(seed)}\n  {error!r}", flush=True)
            else:
                outcomes[f"full rank: {outcome.exact}"] += 1
                outcomes[f"exported: {outcome.exported}"] += 1
            if (seed - first) % 50 == 49:
                seconds = time.perf_counter() - start
                print(f"{seed + 1 - first} cases, {seconds:.0f} s", flush=True)
    for words, number in (*sorted(outcomes.items()), *failures.most_common()):
        print(f"{number:6d}  {words}")
    failed = sum(failures.values())
    print(f"{sum(outcomes.values()) // 2 + failed} cases, {failed} failed")
    return failed


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(bool(main(*numbers, *(0,)[: 2 - len(numbers)])))
