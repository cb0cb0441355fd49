"""What routers did in training, from the logs: which experts were chosen, how evenly, and how much that changed.

Source: Qiu, Huang, Fu (NAACL 2024, arXiv 2310.10908), who plot expert selection over training. At every logged step the
same few texts were routed, so what changes is the routing and not the texts.

Legend: T logged steps, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoe.errors import UserError
from emoe.evaluation.runs import Run


@dataclass(frozen=True)
class LayerHistory:
    """One converted layer of one run.

    Attributes:
        steps_T: optimizer steps.
        entropy_T: of the load over experts, 1 is uniform.
        max_share_T: of the load, the busiest expert's.
        overlap_T: share of a token's experts that it had at the logged step before; NaN at first.
        frequencies_TE: share of tokens that chose each expert.
    """

    steps_T: np.ndarray
    entropy_T: np.ndarray
    max_share_T: np.ndarray
    overlap_T: np.ndarray
    frequencies_TE: np.ndarray

    @property
    def drift(self) -> float:
        """Share of the load that sits with other experts at the end than at first: total variation, 0 to 1."""
        load_TE = self.frequencies_TE / self.frequencies_TE.sum(1, keepdims=True)
        return float(np.abs(load_TE[-1] - load_TE[0]).sum() / 2)


def routing_history(log: Path) -> dict[str, LayerHistory]:
    """Layer → history, from a log.jsonl; empty for a run that has no router.

    Raises:
        UserError: missing or damaged.
    """
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"analysis: cannot read {log} ({error})") from None
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line in lines:
        for layer, facts in line.get("router", {}).items():
            found.setdefault(layer, []).append((line["step"], facts))
    return {layer: _history(entries) for layer, entries in found.items()}


def _history(entries: list[tuple[int, dict[str, Any]]]) -> LayerHistory:
    entries = sorted(entries, key=lambda entry: entry[0])
    columns = {key: [facts[key] for _, facts in entries] for key in ("entropy", "max_share", "overlap", "frequencies")}
    overlap = [np.nan if value is None else value for value in columns["overlap"]]
    return LayerHistory(
        np.array([step for step, _ in entries]),
        np.array(columns["entropy"]),
        np.array(columns["max_share"]),
        np.array(overlap, dtype=float),
        np.array(columns["frequencies"]),
    )


def histories(run: Run) -> dict[int, dict[str, LayerHistory]]:
    """Seed → layer → history."""
    return {seed: routing_history(run.folder / f"seed-{seed}" / "log.jsonl") for seed in run.records}
