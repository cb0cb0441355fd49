"""Do modules emerge? Small ModuleFormers and their baselines, trained alike on several domains.

Arms (configs/moduleformer/): balanced by mutual information, without balancing, balanced as Switch Transformers are,
and a dense model with as many active parameters; `--arms` may add the one with rotary attention. All see the same
tokens in the same order. Measured: perplexity by domain, expert load and entropies over training, KL divergence of
expert use between domains, and perplexity past the trained length. An arm that is finished is not trained again, but
measured again from its checkpoint.

    python scripts/train_moduleformer.py --steps 900 --output docs/results/moduleformer.json
    python scripts/train_moduleformer.py --arms gpt2   # the small GPT-2 of configs/pretrain, into the cache
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
from emoe.finetuning.loop import LOG
from emoe.moduleformer.usage import domain_divergence
from emoe.pretraining.evaluate import evaluate
from emoe.pretraining.text import parse_domains
from emoe.pretraining.tokenizer import load_tokenizer
from emoe.pretraining.train import held_out_tokens, pretrain
from emoe.runtime import cache_home, processor, write_text

CONFIGS = Path(__file__).parents[1] / "configs" / "moduleformer"
GPT2 = CONFIGS.parent / "pretrain" / "gpt2_small_corpus.yaml"
ARMS = {
    "ModuleFormer, mutual information": "tiny",
    "ModuleFormer, mutual information × 3": "tiny-strong",
    "ModuleFormer, unbalanced": "tiny-unbalanced",
    "switch-balanced": "tiny-switch",
    "dense, equal active size": "tiny-dense",
    "rotary attention": "tiny-rotary",
}
LONGER = (1, 2, 4)
"""Lengths measured, in trained lengths; each divides the last."""

PARTS = {"attention": "attention", "ffn": "FFN"}
USES = {"load": "loads", "probability": "mean probabilities"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arms",
        default="tiny,tiny-strong,tiny-unbalanced,tiny-switch,tiny-dense",
        help="files, by their stems; or gpt2",
    )
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
    if "gpt2" in stems:
        print(f"{train_gpt2(arguments)}: a GPT-2 to convert", file=sys.stderr)
    names = [name for name, stem in ARMS.items() if stem in stems]
    if not names:
        return
    arms = {name: train(name, corpus, arguments) for name in names}
    first = arms[names[0]]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
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
    report = trained(name, config)
    lines = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    arm = {key: report[key] for key in ("parameters", "steps", "tokens", "minutes", "tokens_per_second")}
    arm["over_training"] = [over_training(line) for line in lines if line.get("gates")]
    return arm | measured(output, config)


def trained(name: str, config: PretrainConfig) -> dict[str, Any]:
    """The report of a training, which is made unless it is there already."""
    output = Path(config.output)
    if not (output / PRETRAINED).exists():
        print(f"{name}:", file=sys.stderr)
        with progress_bar(False, unit="steps") as show:
            pretrain(config.model_copy(update={"resume": True}), show)
    report = json.loads((output / PRETRAINED).read_text())
    if any(report["settings"][key] != getattr(config, key) for key in ("steps", "corpus", "seed", "architecture")):
        sys.exit(f"{output} was trained with other settings; remove it or give another --folder")
    return report


def train_gpt2(arguments: argparse.Namespace) -> Path:
    """The small English GPT-2, in the cache."""
    given = yaml.safe_load(GPT2.read_text()) | {"seed": arguments.seed}
    given |= {"output": str(cache_home() / "trained" / "gpt2-small-corpus")}
    given |= {"corpus": arguments.corpus} if arguments.corpus else {}
    given |= {"steps": arguments.steps} if arguments.steps else {}
    trained("GPT-2", PretrainConfig(**given))
    return Path(given["output"])


def over_training(line: dict[str, Any]) -> dict[str, Any]:
    """Means over the gates of each part, of one line of the log; loads relative to equal ones."""
    found: dict[str, Any] = {"step": line["step"]}
    for part in PARTS:
        gates = [gate for gate in line["gates"] if gate["part"] == part]
        mean = lambda values: sum(values) / len(gates)  # noqa: B023, E731
        found[part] = {
            "marginal": mean(g["marginal"] for g in gates),
            "conditional": mean(g["conditional"] for g in gates),
            "most": mean(math.log(len(g["load"])) for g in gates),
            "largest_load": mean(max(g["load"]) * len(g["load"]) for g in gates),
            "unused": mean(sum(load < 0.1 / len(g["load"]) for load in g["load"]) / len(g["load"]) for g in gates),
        }
    return found


def measured(output: Path, config: PretrainConfig) -> dict[str, Any]:
    """Of a checkpoint, on the same held-out text cut into shorter and longer sequences: perplexity by domain at the
    trained length and beyond, and divergence between domains by part and kind of use."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    longest = LONGER[-1] * config.sequence_length
    tokens = {d.name: held_out_tokens(d, tokenizer, config, longest) for d in parse_domains(config.corpus)}
    longer, gates = {}, {}
    for factor in LONGER:
        length = factor * config.sequence_length
        found = evaluate(model, {name: part_BT.reshape(-1, length) for name, part_BT in tokens.items()})
        longer[str(length)] = {name: round(result["perplexity"], 4) for name, result in found.items()}
        gates = gates or {name: result["gates"] for name, result in found.items() if result["gates"]}
    perplexity = longer[str(config.sequence_length)]
    divergence = {part: divergence_of(gates, part) for part in PARTS} if gates else None
    return {"perplexity": perplexity, "longer": longer, "divergence": divergence}


def divergence_of(gates: dict[str, list[dict[str, Any]]], part: str) -> dict[str, list[list[float]]]:
    """`domain_divergence` over the gates of one part, by kind of use."""
    chosen = {name: [gate for gate in found if gate["part"] == part] for name, found in gates.items()}
    return {use: domain_divergence(chosen, use).tolist() for use in USES}


def markdown(result: dict[str, Any], stem: str) -> str:
    """The page of results."""
    domains, arms = result["domains"], result["arms"]
    lines = [
        "# ModuleFormer and its baselines, small",
        "",
        f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens of {', '.join(domains)}, drawn equally; seed "
        f"{result['seed']}; {result['hardware']}; commit {result['commit'][:7]}. `{result['command']}`",
        "",
        "Perplexity on held-out text from all over each domain.",
        "",
        f"| | parameters, active | {' | '.join(domains)} | minutes |",
        "|---|---:|" + "---:|" * (len(domains) + 1),
    ]
    for name, arm in arms.items():
        counts = arm["parameters"]
        cells = [f"{counts['total'] / 1e6:.2f} M, {counts['active'] / 1e6:.2f} M"]
        cells += [f"{arm['perplexity'][d]:.2f}" for d in domains] + [f"{arm['minutes']:.1f}"]
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
    lines += [
        "",
        "Gates, means over layers. Of the last line of the log: the largest load over an equal one, the share of "
        "experts with less than a tenth of it, and entropies (nats) beside the most that they can be, log E: a gate "
        "whose H(m\\|x) is there does not choose. KL divergence between domains (nats), mean and largest over pairs, "
        "of loads and of mean probabilities: loads of such a gate are choices among near ties.",
        "",
        "| | gates | largest load | unused | H(m) | H(m\\|x) | log E | KL of loads | KL of probabilities |",
        "|---|---|" + "---:|" * 7,
    ]
    for name, arm in arms.items():
        for part, called in PARTS.items() if arm["divergence"] else ():
            last = arm["over_training"][-1][part]
            cells = [called, f"{last['largest_load']:.2f}", f"{100 * last['unused']:.0f}%"]
            cells += [f"{last[key]:.3f}" for key in ("marginal", "conditional", "most")]
            for use in USES:
                matrix = torch.tensor(arm["divergence"][part][use])
                pairs = matrix[~torch.eye(len(domains), dtype=torch.bool)]
                cells.append(f"{pairs.mean():.4f}, {pairs.max():.4f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![entropies over training, divergence between domains]({stem}.png)", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Entropies and loads over training, and the divergence matrices of the balanced arms; a row a part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {name: arm for name, arm in result["arms"].items() if arm["over_training"]}
    shown = [name for name in arms if ARMS[name] in ("tiny", "tiny-strong", "tiny-switch")]
    size = (4 * (2 + len(shown)), 3.6 * len(PARTS))
    figure, axes = plt.subplots(len(PARTS), 2 + len(shown), figsize=size, layout="constrained")
    for row, (part, called) in zip(axes, PARTS.items(), strict=True):
        for name, arm in arms.items():
            steps, points = [p["step"] for p in arm["over_training"]], [p[part] for p in arm["over_training"]]
            line = row[0].plot(steps, [point["marginal"] for point in points], label=name)[0]
            row[0].plot(steps, [p["conditional"] for p in points], linestyle="--", color=line.get_color())
            row[0].axhline(points[-1]["most"], color="#57606a", linewidth=0.5)
            row[1].plot(steps, [point["largest_load"] for point in points], label=name)
        row[0].set(title=f"{called}: H(m), dashed H(m|x)", xlabel="step", ylabel="nats, mean over gates")
        row[1].set(title=f"{called}: largest load over an equal one", xlabel="step")
        row[1].legend(fontsize=7)
        matrices = {name: arms[name]["divergence"][part]["load"] for name in shown}
        top = max((max(map(max, matrix)) for matrix in matrices.values()), default=1)
        for axis, (name, matrix) in zip(row[2:], matrices.items(), strict=True):
            image = axis.imshow(matrix, vmin=0, vmax=top, cmap="magma")
            ticks = range(len(result["domains"]))
            axis.set_xticks(ticks, result["domains"], rotation=45, fontsize=7)
            axis.set_yticks(ticks, result["domains"], fontsize=7)
            axis.set_title(f"{called}: KL of loads, {name}", fontsize=8)
            figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
