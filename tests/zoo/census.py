"""Try every diffusion transformer of the zoo; writes docs/models.md and docs/models.json.

PYTHONPATH=tests:samples:samples/fashion_dit python -m zoo.census [NAME...] [--again | --sizes]
"""

from __future__ import annotations

import argparse
import multiprocessing
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from support.artifacts import quick_exports

from zoo.finding import Check, Finding, failed, refused_sizes, take
from zoo.other_sizes import try_sizes
from zoo.report import ENTRIES, read_report, totals, totals_line, write_report

REPORT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
SECONDS, THREADS = 300.0, 2


def main() -> None:
    """Go through the entries one after another, each in a fresh process."""
    parser = argparse.ArgumentParser(description="Try every diffusion transformer of the zoo.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries; all without any")
    parser.add_argument("--again", action="store_true", help="also those that the report has")
    parser.add_argument("--sizes", action="store_true", help="anew, and nothing else, in haste")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one entry")
    parser.add_argument("--report", type=Path, default=REPORT, help="the Markdown file")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(ENTRIES))
    if unknown:
        parser.error(f"no such entry: {', '.join(unknown)}")
    torch.set_num_threads(THREADS)  # as in the processes: the report names the number
    findings = read_report(options.report.with_suffix(".json"))
    names = options.names or list(ENTRIES)
    if options.again:
        findings = {name: finding for name, finding in findings.items() if name not in names}
    if options.sizes:
        open_names = [name for name in names if name in findings]
    else:
        open_names = [name for name in names if not _whole(findings.get(name))]
    for number, name in enumerate(open_names, start=1):
        if options.sizes:
            findings[name] = replace(findings[name], others=_sizes_of(name))
        else:
            findings[name] = take_apart(name, options.seconds, findings.get(name))
        write_report(findings.values(), options.report)
        print(f"{number}/{len(open_names)} {progress(findings[name])}", flush=True)
    print(totals_line(totals(findings.values())).strip("*"))


def take_apart(name: str, seconds: float, known: Finding | None = None) -> Finding:
    """The finding of one entry, from a process that may crash or hang.

    Args:
        name: of the entry.
        seconds: for all of it.
        known: what was found out before.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_take_and_send, args=(name, known, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return known or failed(name, f"not done after {seconds:.0f} s", seconds)
        finding = receiver.recv()
        assert isinstance(finding, Finding)
        process.join(5)  # it may put away what it holds
        return finding
    except EOFError:
        process.join()
        return known or failed(name, f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def progress(finding: Finding) -> str:
    """One line for the terminal."""
    checks: dict[str, Check] = {
        "full rank": finding.full_rank,
        "ONNX": finding.onnx,
        "sampler": finding.sampler,
    }
    checks |= {f"other {size}": check for size, check in finding.others.items()}
    parts = [f"{k} {'yes' if check.passed else check.reason[:160]}" for k, check in checks.items()]
    covered = "" if finding.coverage is None else f"{finding.coverage:.2f} covered, "
    return f"{finding.name} ({finding.seconds:.0f} s): {covered}{'; '.join(parts)}"


def _take_and_send(name: str, known: Finding | None, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    finding = known or take(ENTRIES[name])
    if not finding.closed:
        finding = replace(finding, closed=refused_sizes(ENTRIES[name]))
    sender.send(replace(finding, others=_sizes_of(name)))


def _whole(finding: Finding | None) -> bool:
    """Whether nothing of an entry is left to find out."""
    return finding is not None and bool(finding.closed) and bool(finding.others)


def _sizes_of(name: str) -> dict[str, Check]:
    warnings.simplefilter("ignore")
    with quick_exports():
        return try_sizes(ENTRIES[name])


if __name__ == "__main__":
    main()
