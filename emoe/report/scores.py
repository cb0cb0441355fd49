"""Scores of fine-tuned models on a terminal. Comparing arms is another matter: `emoe compare`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from emoe.report.terminal import terminal


def print_runs(records: list[dict[str, Any]]) -> None:
    """A row for each set and reading, a column for each seed."""
    first = records[0]
    title = f"{first['task']}, {first['method']}, {first['tuning']}, {first['train_examples']} training examples"
    table = Table(title=title)
    for heading in ("set", "role", "read as", "metric"):
        table.add_column(heading)
    for record in records:
        table.add_column(f"seed {record['seed']}", justify="right")
    for reading, sets in first["readings"].items():
        for name, facts in sets.items():
            found = [record["readings"].get(reading, {}).get(name) for record in records]  # None: not there that day
            scores = [f"{100 * score['score']:.2f}" if score else "–" for score in found]
            table.add_row(name, facts["role"], reading, facts["metric"], *scores)
    console = terminal()
    console.print(table)
    cost = ", ".join(f"{record['seconds']:.0f} s" for record in records)
    console.print(f"{first['steps']} steps, {cost}; {first['trainable_parameters']:,} trained parameters")


def print_scores(report: dict[str, Any]) -> None:
    """A row for each set."""
    table = Table(title=f"{report['model']}, read as {report['reading']}")
    for heading in ("set", "role", "examples", "metric", "score"):
        table.add_column(heading, justify="right" if heading in ("examples", "score") else "left")
    for name, facts in report["sets"].items():
        table.add_row(name, facts["role"], str(facts["examples"]), facts["metric"], f"{100 * facts['score']:.2f}")
    for task, facts in report.get("lm_eval", {}).items():
        for metric, value in facts.items():
            if isinstance(value, float):
                table.add_row(task, "lm-eval", "", metric, f"{100 * value:.2f}")
    terminal().print(table)
