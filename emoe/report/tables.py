"""Reports as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from emoe.checkpoint.converted import SOURCE_S
from emoe.report.history import gate_line, history_line
from emoe.report.records import Conversion
from emoe.report.terminal import terminal
from emoe.runtime import format_bytes


def print_report(report: dict[str, Any]) -> None:
    """Quality against active experts, load, time and memory of a conversion."""
    console = terminal()
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
    console = terminal()
    provenance = found["provenance"]
    if found["model_type"] == "moduleformer" or found.get("stock"):
        console.print(_short_table(found))
        return
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
        "gate": gate_line(found),
        "split": f"{provenance['split']['method']} ({provenance['split']['reference']})",
        "trainable parameters": f"{found['parameters']:,}",
        "gate table entries": f"{found['gate_entries']:,}, beside the trainable parameters",
        "source": provenance["source"],
        "source digest": provenance["source_digest"],
        "calibration": f"{provenance['calibration']['tokens']} tokens of "
        f"{', '.join(provenance['calibration']['sources'])}",
        "outputs": provenance.get("outputs", SOURCE_S),
        "seed": str(provenance["seed"]),
        "made by": f"emoe {provenance['emoe_version']}",
    }
    if found["groups"]:
        rows["experts by layer"] = groups_line(found["groups"])
    for number, step in enumerate(provenance.get("history", []), 1):
        rows[f"history {number}"] = history_line(step)
    for name, value in (rows | _verified(found)).items():
        facts.add_row(name, value)
    console.print(facts)
    if found["report"] and not brief:
        print_report(Conversion.model_validate(found["report"]).model_dump())


def _short_table(found: dict[str, Any]) -> Table:
    """Facts and history of a ModuleFormer or of a stock model."""
    facts = Table(title=found["folder"], show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in short_facts(found).items():
        facts.add_row(name, value)
    for number, step in enumerate(found["provenance"].get("history", []), 1):
        facts.add_row(f"history {number}", history_line(step))
    for name, value in _verified(found).items():
        facts.add_row(name, value)
    return facts


def _verified(found: dict[str, Any]) -> dict[str, str]:
    """What comparing the weight files with their digests gave, if that was asked for."""
    number = found.get("files_verified")
    if number is None:
        return {}
    return {"weight files": f"{number} are as they were written (SHA256SUMS)" if number else "no SHA256SUMS to compare"}


def short_facts(found: dict[str, Any]) -> dict[str, str]:
    """What there is to say of a ModuleFormer or of a stock model, by name."""
    if found.get("stock"):
        source = found["provenance"].get("source")
        return {
            "model type": f"{found['model_type']}, {stock_kind(found)}",
            **({"source": str(source)} if source else {}),
            **_export_facts(found.get("export")),
            "weights": format_bytes(found["bytes"]),
            **_pretraining_facts(found.get("pretraining")),
        }
    experts = {
        f"{kind} experts": f"{groups_line(part['groups'])}; {part['a token']} a token"
        for kind, part in found["modules"].items()
    }
    return {
        "model type": f"moduleformer, {found['num_layers']} layers, gate {found['gate']}",
        **experts,
        "weights": format_bytes(found["bytes"]),
        **_pretraining_facts(found.get("pretraining")),
    }


def stock_kind(found: dict[str, Any]) -> str:
    """What a stock model of ours is: an export may choose among experts."""
    export = found.get("export")
    experts = f", {export['top_k']} of {export['experts']} experts a token" if export and export["top_k"] else ""
    return f"exported as {export['format']}{experts}" if export else "a dense model"


def _export_facts(report: dict[str, Any] | None) -> dict[str, str]:
    if report is None:
        return {}
    distances = ("" if row["kl"] is None else f", KL {row['kl']:.2g} nats" for row in report["comparisons"])
    rows = zip(report["comparisons"], distances, strict=True)
    compared = [f"{row['tokens']:,} tokens with {row['reference']}{distance}" for row, distance in rows]
    return {"exactness": report["exactness"], "verified": "; ".join(compared) or "no"}


def _pretraining_facts(report: dict[str, Any] | None) -> dict[str, str]:
    if report is None:
        return {}
    perplexities = (f"{name} {value:.4g}" for name, value in report["perplexity"].items())
    return {
        "pre-trained": f"{report['steps']:,} steps, {report['tokens']:,} tokens, by emoe {report['emoe']}",
        "perplexity then": ", ".join(perplexities),
    }


def groups_line(groups: list[list[int]]) -> str:
    """Modules of each layer after surgery: those in the budget, then what each extension added."""
    return ", ".join(" + ".join(map(str, group)) for group in groups)


def print_surgery(report: dict[str, Any]) -> None:
    """What pruning or extending changed."""
    console = terminal()
    table = Table(title=f"{report['verb']} {report['model']}")
    for heading in ("", "before", "after", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("modules", "parameters", "bytes"):
        if name in report:
            before, after = report[name]["before"], report[name]["after"]
            show = format_bytes if name == "bytes" else "{:,}".format
            table.add_row(name, show(before), show(after), f"{after / before:.3f}")
    console.print(table)


def print_tuning(report: dict[str, Any]) -> None:
    """Perplexity before and after, a row a domain."""
    console = terminal()
    title = f"{report['model']}: {report['steps']} steps in {report['minutes']:.1f} min"
    table = Table(title=f"{title}, {report['trained']:,} of {report['parameters']:,} parameters trained")
    for heading in ("domain", "perplexity before", "after"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, found in report["perplexity"].items():
        table.add_row(domain, f"{found['before']:.4g}", f"{found['after']:.4g}")
    console.print(table)


def print_recovery(report: dict[str, Any]) -> None:
    """Perplexity over dense before and after, a row a number of experts and domain."""
    console = terminal()
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


def print_pretraining(report: dict[str, Any]) -> None:
    """Perplexity and, where there are gates, the mean entropies of their choices, a row a domain. Gates of attention
    and of the FFN apart: one kind may choose while the other does not."""
    console = terminal()
    total, active = (report["parameters"][key] / 1e6 for key in ("total", "active"))
    table = Table(
        title=f"{report['model_type']}, {total:.1f} M parameters, {active:.1f} M active: {report['steps']} steps, "
        f"{report['tokens'] / 1e6:.2f} M tokens in {report['minutes']:.1f} min"
    )
    parts = list(dict.fromkeys(gate["part"] for gates in report["gates"].values() for gate in gates))
    names = {"attention": "attention", "ffn": "FFN"}
    columns = [f"{names[part]} {entropy}" for part in parts for entropy in ("H(m)", "H(m|x)")]
    for heading in ("domain", "perplexity", *columns):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, perplexity in report["perplexity"].items():
        means = []
        for part in parts:
            gates = [gate for gate in report["gates"].get(domain, []) if gate["part"] == part]
            means += [sum(gate[key] for gate in gates) / max(1, len(gates)) for key in ("marginal", "conditional")]
        table.add_row(domain, f"{perplexity:.2f}", *(f"{mean:.3f}" for mean in means))
    console.print(table)


def print_export(report: dict[str, Any]) -> None:
    """How an export compares with the model it was made from."""
    console = terminal()
    if "identical" in report:
        same = f"{report['identical']} of {report['layers']}"
        console.print(f"{same} converted layers have exactly the source's weights", highlight=False)
    if "width" in report:
        padding = f", {report['padded']:,} of them padding" if report["padded"] else ""
        console.print(f"FFNs of {report['width']:,} neurons{padding}", highlight=False)
    if not report["comparisons"]:
        console.print("not verified: --verify-tokens 0", highlight=False)
        return
    language = report["comparisons"][0]["kl"] is not None
    tokens = report["comparisons"][0]["tokens"]
    table = Table(title=f"{report['format']} in {report['dtype']} by stock transformers, {tokens} tokens")
    headings = ("compared with", "largest |Δ logit|" if language else "largest |Δ|", "KL (nats)")
    for heading in (*headings, "same first choice" if language else "cosine", "perplexity", "the other's"):
        table.add_column(heading, justify="left" if heading == "compared with" else "right")
    for row in report["comparisons"]:
        theirs, own = (f"{p:.4f}" for p in row["perplexity"]) if row["perplexity"] else ("–", "–")
        kl = f"{row['kl']:.2e}" if language else "–"
        agreement = f"{100 * row['agreement']:.3f}%"
        table.add_row(row["reference"], f"{row['max_difference']:.2e}", kl, agreement, own, theirs)
    console.print(table)
    choices = report["comparisons"][-1]
    if choices["choices"]:
        console.print(
            f"{choices['changed']:,} of {choices['choices']:,} choices of experts differ, none by more than "
            f"{choices['margin']:.1e} standard deviations of a token's logits",
            highlight=False,
        )
