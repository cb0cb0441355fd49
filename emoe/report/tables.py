"""Reports as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from emoe.runtime import format_bytes


def print_report(report: dict[str, Any]) -> None:
    """Quality against active experts, load, time and memory of a conversion."""
    console = Console(markup=False)  # names come from files that others wrote
    if report.get("quality"):
        console.print(quality_table(report))
    summary = load_line(report)
    if summary:
        console.print(summary, highlight=False)
    seconds, peaks = report["seconds"], report["peak_bytes"]
    stages = Table(title=f"time and memory: {sum(seconds.values()):.1f} s in all")
    for heading in ("stage", "seconds", "peak memory"):
        stages.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in seconds:
        stages.add_row(stage, f"{seconds[stage]:.1f}", format_bytes(peaks[stage]))
    console.print(stages)


def quality_table(report: dict[str, Any]) -> Table:
    """One row a number of experts, the dense model first."""
    quality = report["quality"]
    table = Table(title=f"{report['model']}: {quality['measure']} on {quality['tokens']} held-out tokens")
    agreement = "cosine" if quality["measure"] == "hidden-state error" else "top-1 as dense"
    for heading in ("experts a token", "active", quality["measure"], "against dense", agreement, "FFN multiplications"):
        table.add_column(heading, justify="right")
    table.add_row("dense", "100%", f"{quality['dense']:.4g}", "1.000", "100.0%", "1.000")
    for row in quality["rows"]:
        table.add_row(
            f"{row['top_k']} of {report['num_experts']}",
            f"{100 * row['active']:.0f}%",
            f"{row['value']:.4g}",
            "–" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{100 * row['agreement']:.1f}%",
            f"{row['ffn_flops']:.3f}",
            style="bold" if row["top_k"] == report["num_experts_per_tok"] else None,
        )
    return table


def load_line(report: dict[str, Any]) -> str | None:
    """How evenly the experts were used over all converted layers."""
    loads = [layer["load"] for layer in report["layers"] if layer.get("load")]
    if not loads:
        return None
    evenness = sum(load["evenness"] for load in loads) / len(loads)
    busiest = max(loads, key=lambda load: load["busiest"])["busiest"]
    return f"expert load: evenness {evenness:.3f} (1 is uniform), busiest expert {busiest:.2f} times its fair share"


def print_inspection(found: dict[str, Any], brief: bool = False) -> None:
    """What `emoe inspect` shows; `brief` leaves the report out."""
    console = Console(markup=False)  # names come from files that others wrote
    provenance = found["provenance"]
    facts = Table(title=found["folder"], show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    layers = found["layers"]
    rows = {
        "model type": f"{found['model_type']} (from {found['source']['family']})",
        "converted layers": f"{len(layers)}: {', '.join(map(str, layers))}",
        "experts": f"{found['num_experts']} of {found['neurons_per_expert']} neurons, "
        f"{found['num_experts_per_tok']} a token"
        + (f", {found['shared_experts']} of them always" if found["shared_experts"] else ""),
        "routing": f"{found['routing']}, budget {found['allocation']}",
        "gate": f"{found['gate']} ({provenance['gate']['reference']})",
        "split": f"{provenance['split']['method']} ({provenance['split']['reference']})",
        "trainable parameters": f"{found['parameters']:,}",
        "gate table entries": f"{found['gate_entries']:,} (buffers, not trained)",
        "source": provenance["source"],
        "source digest": provenance["source_digest"],
        "calibration": f"{provenance['calibration']['tokens']} tokens of "
        f"{', '.join(provenance['calibration']['sources'])}",
        "outputs": provenance.get("outputs", "the source's"),
        "seed": str(provenance["seed"]),
        "made by": f"emoe {provenance['emoe_version']}",
    }
    if found["files_verified"] is not None:
        rows["weight files"] = f"{found['files_verified']} are as they were written (SHA256SUMS)"
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    if found["report"] and not brief:
        print_report(found["report"])


def print_recovery(report: dict[str, Any]) -> None:
    """Perplexity over dense before and after, a row a number of experts and domain."""
    console = Console(markup=False)  # names come from files that others wrote
    table = Table(title=f"{report['model']}: {report['steps']} steps in {report['minutes']:.1f} min")
    for heading in ("domain", "experts a token", "active", "perplexity before", "after", "over dense before", "after"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, dense in report["dense"].items():
        for row in report["rows"]:
            before, after = row["before"][domain], row["after"][domain]
            cells = (f"{before:.4g}", f"{after:.4g}", f"{before / dense:.3f}", f"{after / dense:.3f}")
            budget = f"{row['top_k']} of {report['num_experts']}"
            table.add_row(domain, budget, f"{100 * row['active']:.0f}%", *cells)
    console.print(table)
