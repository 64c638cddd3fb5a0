"""`make fuzz N=5000`: so many random cases, with what became of them and every failure."""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter

from hypothesis import HealthCheck, Phase, given, settings

from random_models.cases import Case, cases, outcome_of


def main(count: int) -> int:
    """Try random cases; returns how many failed."""
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    start = time.perf_counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def try_case(case: Case) -> None:
        try:
            outcome = outcome_of(case)
        except Exception as error:  # told, and the search goes on
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures[f"{type(error).__name__} in {last.name}: {str(error)[:200]}"] += 1
            print(f"FAILED {case!r}\n  {type(error).__name__}: {str(error)[:400]}", flush=True)
            return
        outcomes[f"full rank: {outcome.exact}"] += 1
        outcomes[f"exported: {outcome.exported}"] += 1
        done = sum(outcomes.values()) // 2 + sum(failures.values())
        if done % 100 == 0:
            print(f"{done} cases, {time.perf_counter() - start:.0f} s", flush=True)

    try_case()
    for words, number in (*sorted(outcomes.items()), *failures.most_common()):
        print(f"{number:6d}  {words}")
    print(f"{sum(failures.values())} failed, {time.perf_counter() - start:.0f} s")
    return sum(failures.values())


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
