"""What was done to a checkpoint, a line an entry of its provenance."""

from __future__ import annotations

from typing import Any

TOLD = (
    *("task", "method", "tuning", "text", "keep", "threshold", "remove", "normalise", "scope", "train", "loss"),
    *("gates", "to", "fix_k"),
)
"""Settings that a line names, in this order."""


def history_line(step: dict[str, Any]) -> str:
    """One entry of a checkpoint's history: what, on which text, when, from what."""
    said = [str(step.get("verb"))]
    if step.get("added"):
        said.append(", ".join(f"{number} {kind} experts a layer" for kind, number in step["added"].items()))
    if step.get("old_text"):
        said.append(f"gates fitted on {_listed(step.get('text'))} against {_listed(step['old_text'])}")
    settings = step.get("settings") or {}
    said.append(", ".join(f"{key} {_listed(settings[key])}" for key in TOLD if settings.get(key) not in (None, [])))
    if step.get("steps"):
        said.append(f"{step['steps']} steps")
    if step.get("when"):
        said.append(f"{step['when']}, from {str(step.get('from_digest'))[:16]}")
    return "; ".join(part for part in said if part)


def gate_line(found: dict[str, Any]) -> str:
    """The gate that `inspect` found and where it comes from, which is the conversion unless training put it there."""
    converted = found["provenance"]["gate"]
    known = converted["reference"] if found["gate"] == converted["method"] else "trained after the conversion"
    return f"{found['gate']} ({known})"


def _listed(value: Any) -> str:
    """A setting as prose; several values with "and" between them, commas being between settings."""
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
