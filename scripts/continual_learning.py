"""Learning German, then French, without forgetting English: new modules against full fine-tuning and LoRA.

Every arm sees the same tokens in the same order. LoRA's rank is the one whose matrices have as many entries as the new
modules; full fine-tuning trains everything. New modules have random gates, which train, or gates fitted on the new text
against the old one, which stay: no other arm is shown old text, and none trains on it. Each arm runs at several
learning rates, since one that fits all would decide the comparison. The plot has forgetting (rise of the log
perplexity on all that was known before, the language learnt first included) over learning (fall of the new one).

    python scripts/continual_learning.py --model smollm2-135m --output docs/results/continual_smollm2.json   # hours
    emoe pretrain --config configs/moduleformer/tiny.yaml --corpus fiction --corpus essays --corpus definitions \
        --output runs/moduleformer   # one that has not read the new languages
    python scripts/continual_learning.py --model runs/moduleformer --attention 1 --output docs/results/continual_mf.json
    python scripts/continual_learning.py --steps 2 --tokens-per-step 128 --held-out-tokens 256 --limit 1 …   # a trial
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from stages import (
    Stages,
    check_pretraining,
    figure,
    footer,
    load,
    measured,
    parameters,
    save,
    settings_of,
)

from emoe.finetuning.low_rank import entries_of_rank_one
from emoe.runtime import write_text

RATES = {
    "new-modules": (1e-3, 3e-3, 3e-4),
    "fitted-gates": (1e-3, 3e-3, 3e-4),
    "lora": (3e-4, 1e-3, 1e-4),
    "all": (3e-5, 1e-4, 3e-4),
}
"""Arm → peaks of the learning rate that are tried, the one that is tried alone first."""

MARKERS = "osv"
"""Of the plot, by place of the learning rate."""

LEVELS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Falls of the log perplexity of what is learnt, nats a token, at which arms are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="dense alias or folder, or a folder with experts")
    parser.add_argument("--old", nargs="+", default=["english=corpus:essays", "definitions=corpus:definitions"])
    parser.add_argument("--tasks", nargs="+", default=["german=corpus:german", "french=corpus:french"])
    parser.add_argument("--also", nargs="+", default=["german quotes=corpus:quotes"], help="measured, not trained on")
    parser.add_argument("--experts", type=int, default=4, help="new FFN experts a layer and task")
    parser.add_argument("--attention", type=int, default=0, help="new attention experts a layer and task")
    parser.add_argument("--split", type=int, default=64, help="experts that a dense model is cut into, all on")
    parser.add_argument("--penalty", type=float, default=0.01, help="factor of the penalty on new gate rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--held-out-tokens", type=int, default=2048, help="of each domain")
    parser.add_argument("--points", type=int, default=2, help="measurements on the way")
    parser.add_argument("--limit", type=int, help="at most so many learning rates an arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/emoe-continual"), help="for checkpoints; goes on there")
    parser.add_argument("--output", type=Path, default=Path("docs/results/continual_smollm2.json"))
    arguments = parser.parse_args()

    named = lambda items: dict(item.split("=", 1) for item in items)  # noqa: E731
    check_pretraining(arguments.model, named(arguments.tasks))
    stages = Stages(arguments.work, settings_of(arguments, [arguments.model], "seeds", "limit"))
    base = stages.converted(arguments.model, experts=arguments.split, top_k=arguments.split)
    domains = named([*arguments.old, *arguments.tasks, *arguments.also])
    texts = stages.texts(domains)
    sizes = {"tokens": arguments.held_out_tokens, "length": arguments.sequence_length}
    start = stages.figures("base", lambda: measured(base, stages.held(list(domains)), **sizes))
    rows = []
    for seed in arguments.seeds:
        for arm, rates in RATES.items():
            for rate in rates[: arguments.limit]:
                rows += _sequence(
                    stages,
                    base,
                    arm,
                    rate,
                    seed,
                    {name: text for name, text in texts.items() if name not in named(arguments.also)},
                    list(domains),
                    arguments,
                )
    result = {
        **stages.origin(),
        "model": arguments.model,
        "base": start,
        "old": list(named(arguments.old)),
        "rows": rows,
    }
    result |= {"settings": {k: v for k, v in vars(arguments).items() if k not in ("work", "output")}}
    write_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")
    write_text(arguments.output.with_suffix(".md"), markdown(result))
    plot(result, arguments.output.with_suffix(".png"))
    print(markdown(result))


def _sequence(stages: Stages, base: Path, arm, rate, seed, texts, names, arguments) -> list[dict[str, Any]]:
    """One arm through all tasks, each on top of the one before."""
    model, rows, old = base, [], []
    tasks = [item.split("=")[0] for item in arguments.tasks]
    for task, text in texts.items():
        if task not in tasks:
            old.append(str(text))
            continue
        name = f"{arm} {rate} {seed} {task}"
        settings = _settings(arguments, text, rate, seed, stages.held(names))
        if arm != "all":
            new = {"experts": arguments.experts, "attention": arguments.attention, "seed": seed}
            if arm == "fitted-gates":
                new |= {"text": [str(text)], "old_text": list(old)}
            bigger = stages.extended(f"bigger {name}", model, **new)
        if arm == "new-modules":
            loss = [f"router={arguments.penalty}"] if _has_tables(bigger) and arguments.penalty else []
            done = stages.tuned(name, bigger, train=arm, loss=loss, **settings)
        elif arm == "fitted-gates":
            done = stages.tuned(name, bigger, train="new-experts", **settings)
        elif arm == "lora":
            wanted = parameters(bigger) - parameters(model)
            done = stages.tuned(name, model, train=arm, lora_rank=_rank(model, wanted), **settings)
        else:
            done = stages.tuned(name, model, train=arm, **settings)
        report = json.loads((done / "emoe_tune.json").read_text(encoding="utf-8"))
        rows.append(
            {"arm": arm, "rate": rate, "seed": seed, "task": task, "trained": report["trained"]}
            | {"rank": report["settings"]["lora_rank"] if arm == "lora" else None}
            | {"curve": [point["perplexity"] for point in report["curve"]]}
            | {"minutes": report["minutes"], "tokens": report["tokens"]}
            | {"after": {name: report["perplexity"][name]["after"] for name in names}}
        )
        model = done
        old.append(str(text))
    return rows


def _settings(arguments, text: Path, rate: float, seed: int, held: list[str]) -> dict[str, Any]:
    return {
        "text": [str(text)],
        "learning_rate": rate,
        "seed": seed,
        "steps": arguments.steps,
        "tokens_per_step": arguments.tokens_per_step,
        "sequence_length": arguments.sequence_length,
        "held_out_tokens": arguments.held_out_tokens,
        "held_out": held,
        "evaluate_steps": max(1, arguments.steps // arguments.points),
    }


def _has_tables(folder: Path) -> bool:
    """Whether the gate is trained by itself: an average-key gate follows the neurons."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return facts.get("emoe_gate") != "average-key"


def _rank(folder: Path, wanted: int) -> int:
    """LoRA's rank on every linear and every expert for about `wanted` entries."""
    return max(1, round(wanted / entries_of_rank_one(load(folder))))


def _change(after: dict[str, float], before: dict[str, float], names: list[str]) -> float:
    """Mean rise of the log perplexity, nats a token."""
    return sum(math.log(after[name] / before[name]) for name in names) / len(names)


def _earlier(row: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """Perplexity on each task that the arm has learnt before this one, right after it was learnt."""
    key = lambda other: [other[name] for name in ("arm", "rate", "seed")]  # noqa: E731
    rows = [other for other in result["rows"] if key(other) == key(row)]
    return {other["task"]: other["after"][other["task"]] for other in rows[: rows.index(row)]}


def _forgotten(point: dict[str, float], row: dict[str, Any], result: dict[str, Any]) -> float:
    """Mean rise of the log perplexity on the old domains and on tasks learnt before, since they were known best."""
    earlier = _earlier(row, result)
    return _change(point, {**result["base"], **earlier}, [*result["old"], *earlier])


def _points(row: dict[str, Any], result: dict[str, Any]) -> list[tuple[float, float]]:
    """(Learnt, forgotten) at each measurement of a training, nats a token."""
    points = [*row["curve"], row["after"]]
    return [(-_change(point, result["base"], [row["task"]]), _forgotten(point, row, result)) for point in points]


def markdown(result: dict[str, Any]) -> str:
    """How much is forgotten for what is learnt, by arm; then a row an arm, learning rate and task."""
    domains = list(result["base"])
    lines = [
        *_at_equal_learning(result),
        f"Perplexity on {result['settings']['held_out_tokens']} held-out tokens of each domain, from all over it; "
        f"forgetting is the mean rise of the log perplexity on {', '.join(result['old'])}, nats a token, against the "
        "model at the start; given back, that on the tasks learnt before, against the model right after each.",
        "",
        "| after | arm | rate | seed | trained | minutes | " + " | ".join(domains) + " | forgetting | given back |",
        "|---|---|---:|---:|---:|---:" + "|---:" * len(domains) + "|---:|---:|",
        "| start | | | | | | " + " | ".join(f"{result['base'][d]:.2f}" for d in domains) + " | 0 | |",
    ]
    for row in result["rows"]:
        values = " | ".join(f"{row['after'][d]:.2f}" for d in domains)
        forgotten = _change(row["after"], result["base"], result["old"])
        earlier = _earlier(row, result)
        back = f"{_change(row['after'], earlier, list(earlier)):+.4f}" if earlier else ""
        arm = row["arm"] if row["rank"] is None else f"{row['arm']}, rank {row['rank']}"
        facts = (row["task"], arm, f"{row['rate']:g}", str(row["seed"]), f"{row['trained']:,}")
        facts += (f"{row['minutes']:.1f}", values, f"{forgotten:+.4f}", back)
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join([*lines, footer(result)])


def _at_equal_learning(result: dict[str, Any]) -> list[str]:
    """A table a task: the least that an arm forgets where it has learnt at least so much, mean and range over seeds."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["task"] == task]
        reached = {arm: _least(result, [row for row in rows if row["arm"] == arm]) for arm in RATES}
        levels = [level for level in LEVELS if any(level in found for found in reached.values())]
        seeds = len({row["seed"] for row in rows})
        spread = "one seed" if seeds == 1 else f"mean over {seeds} seeds (lowest to highest)"
        heads = [f"{level:g} ({result['base'][task] * math.exp(-level):.1f})" for level in levels]
        lines += [
            f"For {task}: the least that is forgotten, nats a token, on all that was known before it (old domains and "
            f"earlier tasks alike), at a measurement where at least so much has been learnt, whatever the learning "
            f"rate; {spread}. A dash: not reached.",
            "",
            f"| {task} learnt, nats (perplexity) | {' | '.join(heads)} |",
            "|---" + "|---:" * len(levels) + "|",
            *(f"| {arm} | {' | '.join(at.get(level, '–') for level in levels)} |" for arm, at in reached.items()),
            "",
        ]
    return lines


def _least(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[float, str]:
    """Level of learning → what is forgotten there at least, as text; of those levels that every seed reaches."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).extend(_points(row, result))
    found = {}
    for level in LEVELS:
        least = [min((lost for learnt, lost in points if learnt >= level), default=None) for points in by_seed.values()]
        if least and None not in least:
            spread = f" ({min(least):+.2f} to {max(least):+.2f})" if len(least) > 1 else ""
            found[level] = f"{sum(least) / len(least):+.2f}{spread}"
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel a task: forgetting over learning, a line an arm and learning rate through the measurements."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    made = figure(6 * len(tasks), 4.5)
    colours = {"new-modules": "#1a7f37", "fitted-gates": "#0969da", "lora": "#bf8700", "all": "#cf222e"}
    for place, task in enumerate(tasks):
        axes = made.add_subplot(1, len(tasks), place + 1)
        for row in (row for row in result["rows"] if row["task"] == task):
            label = f"{row['arm']}, {row['rate']:g}" if row["seed"] == result["rows"][0]["seed"] else None
            style = {"color": colours[row["arm"]], "marker": MARKERS[RATES[row["arm"]].index(row["rate"])]}
            axes.plot(*zip(*_points(row, result), strict=True), markersize=4, alpha=0.7, label=label, **style)
        axes.axhline(0, color="#57606a", linewidth=1)
        axes.set_xlabel(f"learning: fall of the log perplexity on {task}")
        axes.set_ylabel("forgetting: rise on all that was known before")
        axes.set_title(f"after {task}", fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save(made, path)


if __name__ == "__main__":
    main()
