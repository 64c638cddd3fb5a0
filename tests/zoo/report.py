"""From findings to docs/models.md and docs/models.json, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.common.environment import environment
from zoo.entry import ZooEntry
from zoo.finding import REFUSED, Check, Finding
from zoo.tables import audio, image, video, wan

FAMILIES: Mapping[str, Sequence[ZooEntry]] = {
    "Image": image.ENTRIES,
    "Video": (*wan.ENTRIES, *video.ENTRIES),
    "Audio and other": audio.ENTRIES,
}
ENTRIES: Mapping[str, ZooEntry] = {
    entry.name: entry for entries in FAMILIES.values() for entry in entries
}
COLUMNS = (
    "model",
    "sites / linears",
    "MACs covered",
    "full rank",
    "ONNX step",
    "ONNX sampler",
    "any",
    "other sizes",
)
SHOWN_REASON = 200


def totals(findings: Iterable[Finding]) -> dict[str, int]:
    """How many models were tried, and how many passed each check."""
    listed = list(findings)
    return {
        "models": len(listed),
        "full_rank": sum(finding.full_rank.passed for finding in listed),
        "onnx": sum(finding.onnx.passed for finding in listed),
        "sampler": sum(finding.sampler.passed for finding in listed),
    }


def write_report(findings: Iterable[Finding], path: Path) -> None:
    """Write the table as Markdown, and the same beside it as JSON.

    Args:
        findings: in any order; those of no entry are left out.
        path: of the Markdown file, such as docs/models.md.
    """
    by_name = {finding.name: finding for finding in findings}
    ordered = [by_name[name] for name in ENTRIES if name in by_name]
    where = environment()
    where["versions"]["diffusers"] = version("diffusers")
    families = {entry.name: family for family, listed in FAMILIES.items() for entry in listed}
    models = [{"family": families[finding.name], **asdict(finding)} for finding in ordered]
    written = {**where, "totals": totals(ordered), "models": models}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")
    parts = [_heading(ordered, where)]
    for family, entries in FAMILIES.items():
        rows = [by_name[entry.name] for entry in entries if entry.name in by_name]
        if rows:
            parts.append(f"## {family}\n\n{_table(rows)}")
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")


def read_report(path: Path) -> dict[str, Finding]:
    """Findings by name from the JSON file; none where there is no file."""
    if not path.exists():
        return {}
    listed = json.loads(path.read_text())["models"]
    return {fields["name"]: _finding(fields) for fields in listed}


def totals_line(counts: Mapping[str, int]) -> str:
    """The first line of the report."""
    return (
        f"**{counts['full_rank']} of {counts['models']} optimised and equal at full rank; "
        f"{counts['onnx']} through ONNX Runtime, {counts['sampler']} with the whole sampling run "
        "in one model.**"
    )


def _finding(fields: Mapping[str, Any]) -> Finding:
    plain = {name: value for name, value in fields.items() if name != "family"}
    checks = {name: Check(**fields[name]) for name in ("full_rank", "onnx", "sampler")}
    others = {size: Check(**check) for size, check in fields.get("others", {}).items()}
    return Finding(**{**plain, **checks, "others": others})


def _heading(findings: Sequence[Finding], where: Mapping[str, Mapping[str, Any]]) -> str:
    listed = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return f"""# Models

{totals_line(totals(findings))}

Written by `make models`; do not edit. {where["machine"]["processor"]}; {listed}.

The transformers of diffusers at tiny configurations with random weights (`tests/zoo`), 5 steps,
batch 2, steps 1, 2 and 4 CALIBRATE, no adapter for any of them.

- sites / linears: linear layers that CALIBRATE steps correct, of those that depend on the latent;
  MACs covered: their share of the multiply-accumulates of those layers. A model this small spends
  more of them outside its blocks than a real one.
- full rank: with factors that lose nothing a CALIBRATE step must be the plain step. Relative L2
  error of the worst step against the original model over a run; in brackets that of rank 0.
- ONNX step, ONNX sampler: ONNX Runtime on the CPU against the optimised model in PyTorch, over
  the run. `n/a`: the update of the latent cannot be told from the model's output.
- any: what one file in the layout `step` can leave open (`dynamic=`): the batch, the length of the
  prompt, the tokens of a latent (B, tokens, C). Why the others are refused is in `models.json`.
- other sizes: calls with 1 and 3 samples, a longer prompt and twice the height, under a plan that
  was recorded at one size; those named are as exact as full rank is. `refused`: in words, which
  `models.json` has. Sizes that a model does not have, or cannot take itself, are left out."""


def _table(findings: Sequence[Finding]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---|---|---|---|---|"]
    for finding in findings:
        known = finding.sites is not None and finding.coverage is not None
        failed_step = None if finding.onnx.passed or not known else finding.onnx
        cells = [
            finding.name,
            f"{finding.sites} / {finding.linears}" if known else "",
            f"{finding.coverage:.2f}" if known else "",
            _full_rank_cell(finding),
            _cell(finding.onnx),
            "the same" if finding.sampler == failed_step else _cell(finding.sampler),
            _open_cell(finding.closed),
            _others_cell(finding.others),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _full_rank_cell(finding: Finding) -> str:
    stale = "" if finding.stale is None else f" ({finding.stale:.0e})"
    return _cell(finding.full_rank) + stale * finding.full_rank.passed


def _open_cell(closed: Mapping[str, str]) -> str:
    opened = [size for size, reason in closed.items() if not reason]
    return ", ".join(opened) or ("none" if closed else "not tried")


def _others_cell(others: Mapping[str, Check]) -> str:
    if not others:
        return "not tried"
    exact = [size for size, check in others.items() if check.passed]
    refused = [size for size, check in others.items() if check.reason.startswith(REFUSED)]
    wrong = [size for size, check in others.items() if not check.explained]
    parts = [", ".join(exact)] if exact else []
    parts += [f"refused: {', '.join(refused)}"] if refused else []
    parts += [f"**wrong**: {', '.join(wrong)}"] if wrong else []
    return "; ".join(parts) or "none"


def _cell(check: Check) -> str:
    if check.passed:
        return f"{check.error:.0e}"
    reason = check.reason
    shown = reason if len(reason) <= SHOWN_REASON else reason[: SHOWN_REASON - 1] + "…"
    if shown.startswith("n/a") or reason == Check().reason:
        return shown
    return f"**no**: {shown}"
