"""One export from start to end: refuse, say what it costs, write, read back, compare, publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe.calibration.text import BUILTIN, check_source
from emoe.checkpoint.digests import check_digests
from emoe.conversion.workspace import EXPORTED, Workspace
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.exporting.source import Source, dtype_name
from emoe.exporting.spec import (
    MARGIN,
    NARROW_MARGIN,
    NARROW_RELATIVE_TOLERANCE,
    NARROW_TOLERANCE,
    RELATIVE_TOLERANCE,
    TOLERANCE,
    Format,
    Progress,
)
from emoe.exporting.verify import Comparison, verify
from emoe.runtime import format_bytes, require_space, settle_folder, write_text
from emoe.surgery.history import entry, provenance_of, with_entry

ADDED = (
    "experts that were added have gates of their own, which it has not; take them out (`emoe prune --remove added`), "
    "or accept and measure it with --approximate"
)


def run(
    source: Source,
    format: Format,
    workspace: Workspace,
    verify_tokens: int,
    verify_text: str | None,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything behind `emoe.exporting.export`. The folder appears under its name when all of it has gone well."""
    digests = check_digests(source.folder)
    why_not = format.refusal(source)
    if why_not:
        raise UserError(f"--to: {format.name} cannot represent this model: {why_not}")
    if _drops_gates(source, format) and not source.approximate and not verify_tokens:
        raise UserError(f"--verify-tokens: 0 leaves open whether the {format.name} export is the model: {ADDED}")
    check_source(verify_text or BUILTIN, "--verify-text")
    cost = format.cost(source)
    require_space(workspace.output.parent, cost.nbytes, "--output")
    settings = {"to": format.name, "fix_k": source.fix_k if format.routes else None}
    step = entry("export", source.folder, digests, settings=settings)
    say(f"{format.name}: {format_bytes(cost.nbytes)} of weights; {cost.exactness}")
    with workspace.open(Group()):
        try:
            facts = format.write(source, workspace.folder, progress)
            report = {
                "format": format.name,
                "dtype": dtype_name(source.written),
                "bytes": cost.nbytes,
                "exactness": cost.exactness,
                "experts": source.num_experts,
                "top_k": source.top_k if format.routes else None,
                "fix_k": settings["fix_k"],
                "provenance": with_entry(provenance_of(source.folder), step),
                **facts,
                "comparisons": _compared(source, format, workspace.folder, verify_tokens, verify_text, progress),
            }
            _write_files(source, report, workspace.folder)
            workspace.publish()
        except BaseException:
            workspace.abandon()
            raise
    return report


def _compared(
    source: Source, format: Format, folder: Path, tokens: int, text: str | None, progress: Progress
) -> list[dict[str, Any]]:
    """How the export compares with its source; `UserError` where it is not what it is said to be."""
    comparisons = verify(source, format, folder, tokens, text, progress) if tokens else []
    if comparisons:
        _check(comparisons, source, format)
    return [comparison.to_json() for comparison in comparisons]


def _write_files(source: Source, report: dict[str, Any], folder: Path) -> None:
    """What lies beside the weights, all of it settled on the disk."""
    from emoe.report.card import write_export_card

    write_text(folder / EXPORTED, json.dumps(report, indent=2) + "\n")
    write_export_card(report, source.config, source.folder, folder / "README.md")
    settle_folder(folder)


def _drops_gates(source: Source, format: Format) -> bool:
    """Whether added experts, which their gates switch, would be on for every token."""
    return source.extended and not format.routes


def _check(comparisons: list[Comparison], source: Source, format: Format) -> None:
    """Raise `UserError` when a format computes something else than it is said to: something in this model is unlike its
    family. Formats that choose experts are judged on the same choices; these must be as good as the model's own."""
    comparison = comparisons[-1] if format.routes else comparisons[0]
    wrong = None
    if not all(found.finite for found in comparisons):
        wrong = "numbers that are not finite, in the model's output or in the export's"
    elif not (_drops_gates(source, format) and source.approximate):
        wrong = _excess(comparison, source, format)
    if wrong and _drops_gates(source, format):
        raise UserError(f"--to: the {format.name} export computes something else than the model ({wrong}): {ADDED}")
    if wrong:
        ways = ["--dtype float32"] * source.narrow + ["--to dense"] * format.routes
        raise UserError(
            f"--to: the {format.name} export computes something else than the model ({wrong}); nothing was written"
            + (f". Try {', or '.join(ways)}" if ways else "")
        )


def _excess(comparison: Comparison, source: Source, format: Format) -> str | None:
    """In words, what is further off than rounding explains; None where nothing is."""
    narrow = source.narrow
    if comparison.kl is None:
        limit = NARROW_RELATIVE_TOLERANCE if narrow else RELATIVE_TOLERANCE
        if comparison.relative > limit:
            return f"its output is off by {comparison.relative:.2g} of its length, at most {limit:g} was expected"
        return None
    # A softmax that weighs the experts is what the formats have; only those that weigh alike can be near ones.
    tolerance, margin = (TOLERANCE, MARGIN) if source.weighs else (format.tolerance, format.margin)
    limit = NARROW_TOLERANCE if narrow else tolerance
    if comparison.kl > limit:
        found = f"KL {comparison.kl:.2g} nats, at most {limit:g} was expected"
        return f"{found}; largest difference of a logit {comparison.max_difference:.2g}"
    limit = NARROW_MARGIN if narrow else margin
    if format.routes and comparison.margin > limit:
        found = f"it chose an expert {comparison.margin:.2g} standard deviations behind one it left out"
        return f"{found}, at most {limit:g} was expected"
    return None
