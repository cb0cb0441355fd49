"""Do modules emerge? Small ModuleFormers and their baselines, trained alike on several domains.

Arms (configs/moduleformer/): balanced by mutual information, without balancing, balanced as Switch Transformers are,
and a dense model with as many active parameters; `--arms` may add the one with rotary attention. All see the same
tokens in the same order. Measured: perplexity by domain, expert load and entropies over training, KL divergence of
expert loads between domains, and perplexity past the trained length. An arm that is finished is not trained again.

    python scripts/train_moduleformer.py --steps 900 --output docs/results/moduleformer.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml

from emoe.cli.progress import progress_bar, silence_libraries
from emoe.config import PretrainConfig
from emoe.conversion.workspace import PRETRAINED
from emoe.moduleformer.usage import domain_divergence
from emoe.pretraining.evaluate import evaluate
from emoe.pretraining.text import load_domain, parse_domains
from emoe.pretraining.tokenizer import load_tokenizer
from emoe.pretraining.train import LOG, pretrain
from emoe.runtime import write_text

CONFIGS = Path(__file__).parents[1] / "configs" / "moduleformer"
ARMS = {
    "ModuleFormer, mutual information": "tiny",
    "ModuleFormer, unbalanced": "tiny-unbalanced",
    "switch-balanced": "tiny-switch",
    "dense, equal active size": "tiny-dense",
    "rotary attention": "tiny-rotary",
}
LONGER = (1, 2, 4)
"""Lengths measured, in trained lengths."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", default="tiny,tiny-unbalanced,tiny-switch,tiny-dense", help="files, by their stems")
    parser.add_argument("--corpus", action="append", help="as for `emoe pretrain`; default: four domains")
    parser.add_argument("--steps", type=int, help="optimizer steps of each arm; default: the configurations'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emoe-moduleformer"), help="for checkpoints; kept")
    parser.add_argument(
        "--output", type=Path, help="write the results here as JSON, with a page and a figure beside it"
    )
    arguments = parser.parse_args()
    corpus = arguments.corpus or ["fiction", "python", "german", "definitions"]
    silence_libraries()
    datasets.disable_progress_bars()
    stems = arguments.arms.split(",")
    names = [name for name, stem in ARMS.items() if stem in stems]
    arms = {name: train(name, corpus, arguments) for name in names}
    first = arms[names[0]]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "steps": first["steps"],
        "tokens": first["tokens"],
        "seed": arguments.seed,
        "domains": list(first["perplexity"]),
        "arms": arms,
    }
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
        write_text(arguments.output.with_suffix(".md"), markdown(result, arguments.output.stem))
        plot(result, arguments.output.with_suffix(".png"))
    print(markdown(result, "moduleformer"))


def train(name: str, corpus: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one arm, unless it is there already; what is reported of it."""
    output = arguments.folder / ARMS[name]
    given = yaml.safe_load((CONFIGS / f"{ARMS[name]}.yaml").read_text())
    given |= {"corpus": corpus, "seed": arguments.seed, "output": str(output)}
    given |= {"steps": arguments.steps} if arguments.steps else {}
    config = PretrainConfig(**given)
    shared = arguments.folder / "tokenizer"
    shared.mkdir(parents=True, exist_ok=True)
    load_tokenizer(config, parse_domains(corpus), shared)
    config.tokenizer = str(shared)
    if not (output / PRETRAINED).exists():
        print(f"{name}:", file=sys.stderr)
        with progress_bar(False, unit="steps") as show:
            pretrain(config.model_copy(update={"resume": True}), show)
    report = json.loads((output / PRETRAINED).read_text())
    if any(report["settings"][key] != getattr(config, key) for key in ("steps", "corpus", "seed", "architecture")):
        sys.exit(f"{output} was trained with other settings; remove it or give another --folder")
    lines = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    arm = {key: report[key] for key in ("parameters", "steps", "tokens", "minutes", "tokens_per_second", "perplexity")}
    arm["over_training"] = [over_training(line) for line in lines if line.get("gates")]
    arm["evaluations"] = [{"step": line["step"], **line["perplexity"]} for line in lines if "perplexity" in line]
    arm["divergence"] = domain_divergence(report["gates"]).tolist() if report["gates"] else None
    arm["longer"] = longer(output, config)
    return arm


def over_training(line: dict[str, Any]) -> dict[str, float]:
    """Means over the gates of one line of the log; loads relative to equal ones."""
    gates = line["gates"]
    mean = lambda values: sum(values) / len(gates)  # noqa: E731
    return {
        "step": line["step"],
        "marginal": mean(g["marginal"] for g in gates),
        "conditional": mean(g["conditional"] for g in gates),
        "largest_load": mean(max(g["load"]) * len(g["load"]) for g in gates),
        "unused": mean(sum(load < 0.1 / len(g["load"]) for load in g["load"]) / len(g["load"]) for g in gates),
    }


def longer(output: Path, config: PretrainConfig) -> dict[str, dict[str, float]]:
    """Perplexity by domain at the trained length and beyond, on the same held-out text cut differently."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    results = {}
    for factor in LONGER:
        length = factor * config.sequence_length
        tokens = {
            d.name: load_domain(
                d, tokenizer, length=length, held_out=True, share=config.held_out_share, most=config.held_out_tokens
            )
            .with_format("torch")["input_ids"][:]
            .long()
            for d in parse_domains(config.corpus)
        }
        results[str(length)] = {n: round(r["perplexity"], 4) for n, r in evaluate(model, tokens).items()}
    return results


def markdown(result: dict[str, Any], stem: str) -> str:
    """The page of results."""
    domains, arms = result["domains"], result["arms"]
    lines = [
        "# ModuleFormer and its baselines, small",
        "",
        f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens of {', '.join(domains)}, drawn equally; seed "
        f"{result['seed']}; {result['hardware']}; commit {result['commit'][:7]}. `{result['command']}`",
        "",
        "Perplexity on held-out text; load, unused experts and entropies (nats) are means over gates, of the last line "
        "of the log: the largest load over an equal one, and the share of experts with less than a tenth of it.",
        "",
        f"| | parameters, active | {' | '.join(domains)} | minutes | largest load | unused | H(m) | H(m\\|x) |",
        "|---|---:|" + "---:|" * (len(domains) + 5),
    ]
    for name, arm in arms.items():
        counts, last = arm["parameters"], (arm["over_training"] or [None])[-1]
        gates = ["", "", "", ""]
        if last:
            gates = [f"{last['largest_load']:.2f}", f"{100 * last['unused']:.0f}%"]
            gates += [f"{last['marginal']:.3f}", f"{last['conditional']:.3f}"]
        cells = [f"{counts['total'] / 1e6:.2f} M, {counts['active'] / 1e6:.2f} M"]
        cells += [f"{arm['perplexity'][d]:.2f}" for d in domains] + [f"{arm['minutes']:.1f}", *gates]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Past the trained length, mean over domains of the perplexity (held-out text cut at that length):",
        "",
    ]
    lengths = list(next(iter(arms.values()))["longer"])
    lines += [f"| | {' | '.join(lengths)} |", "|---|" + "---:|" * len(lengths)]
    for name, arm in arms.items():
        means = [sum(arm["longer"][length].values()) / len(domains) for length in lengths]
        lines.append(f"| {name} | {' | '.join(f'{m:.2f}' for m in means)} |")
    lines += ["", "KL divergence of expert loads between domains, mean over gates and pairs of domains (nats):", ""]
    lines += ["| | mean | largest |", "|---|---:|---:|"]
    for name, arm in arms.items():
        if arm["divergence"]:
            matrix = torch.tensor(arm["divergence"])
            pairs = matrix[~torch.eye(len(domains), dtype=torch.bool)]
            lines.append(f"| {name} | {pairs.mean():.3f} | {pairs.max():.3f} |")
    return "\n".join([*lines, "", f"![entropies over training, divergence between domains]({stem}.png)", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Entropies over training, and the divergence matrices of the balanced arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {name: arm for name, arm in result["arms"].items() if arm["over_training"]}
    shown = [name for name in arms if ARMS[name] in ("tiny", "tiny-switch")]
    figure, axes = plt.subplots(1, 2 + len(shown), figsize=(4 * (2 + len(shown)), 3.6), layout="constrained")
    for name, arm in arms.items():
        steps = [point["step"] for point in arm["over_training"]]
        line = axes[0].plot(steps, [point["marginal"] for point in arm["over_training"]], label=name)[0]
        conditional = [point["conditional"] for point in arm["over_training"]]
        axes[0].plot(steps, conditional, linestyle="--", color=line.get_color())
        axes[1].plot(steps, [point["largest_load"] for point in arm["over_training"]], label=name)
    axes[0].set(title="H(m), dashed H(m|x)", xlabel="step", ylabel="nats, mean over gates")
    axes[1].set(title="largest load over an equal one", xlabel="step")
    axes[1].legend(fontsize=7)
    top = max((max(map(max, arms[name]["divergence"])) for name in shown), default=1)
    for axis, name in zip(axes[2:], shown, strict=True):
        image = axis.imshow(arms[name]["divergence"], vmin=0, vmax=top, cmap="magma")
        ticks = range(len(result["domains"]))
        axis.set_xticks(ticks, result["domains"], rotation=45, fontsize=7)
        axis.set_yticks(ticks, result["domains"], fontsize=7)
        axis.set_title(f"KL of loads, {name}", fontsize=8)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
