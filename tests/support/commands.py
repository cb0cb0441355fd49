"""Short calls of the command line on tiny models, by the command's name."""

from __future__ import annotations

from pathlib import Path

from support.labelled import write_task
from support.runs import write_run

CONFIGS = Path(__file__).parents[2] / "configs"


def commands(converted: Path, dense: Path, text: Path, place: Path) -> dict[str, list[str]]:
    """Of each command that works offline and does not train; without --json."""
    tokens = ["--calibration-tokens", "2048", "--sequence-length", "64", "--calibration", str(text), "--experts", "8"]
    return {
        "convert": ["--model", str(dense), "--output", str(place / "c"), "--held-out-tokens", "64", *tokens],
        "export": ["--model", str(converted), "--output", str(place / "d")],
        "inspect": [str(converted)],
        "estimate": ["--model", "gpt2"],
        "models": [],
        "doctor": [],
        "fetch": [str(dense)],
        "report": [str(converted), "--html", str(place / "r.html"), "--tokens", "0"],
        "extend": ["--model", str(converted), "--experts", "1", "--output", str(place / "e")],
        "prune": ["--model", str(converted), "--method", "random", "--keep", "0.5", "--output", str(place / "p")],
        "compare": [str(runs(place / "runs", arm)) for arm in ("vanilla", "emoe")] + ["--resamples", "100"],
        "sweep": [str(sweep_file(place / "sweep.yaml")), "--dry-run"],
    }


def long_commands(converted: Path, dense: Path, text: Path, place: Path) -> dict[str, list[str]]:
    """Of each command that shows how far it is, with some steps to show; without --json."""
    model, output = ["--model", str(converted)], lambda name: ["--output", str(place / name)]
    steps = ["--steps", "3", "--tokens-per-step", "32", "--sequence-length", "32", "--held-out-tokens", "64"]
    tokens = ["--calibration-tokens", "1024", "--held-out-tokens", "64", "--sequence-length", "64"]
    pretrain = ["--config", str(CONFIGS / "moduleformer" / "tiny.yaml"), "--corpus", f"own={text}", "--vocabulary"]
    pretrain += ["300", "--corpus-tokens", "4000", "--batch-sequences", "1", *steps]
    analyze = ["--domains", f"a={text}", "--domains", f"b={text}", "--tokens", "128", "--sequence-length", "32"]
    analyze += ["--batch-sequences", "1", "--knock-out", "0"]
    grid = ["--calibration", str(text), "--experts", "8", "--methods", "emoe", "--active", "0.5", *tokens]
    finetune = ["--task", str(write_task(place / "task")), "--max-steps", "3", "--eval-steps", "3"]
    sweep = [str(sweep_file(place / "sweep.yaml")), "--resamples", "100", *output("sweep")]
    short = commands(converted, dense, text, place)
    return {
        **{name: short[name] for name in ("convert", "export", "extend", "prune", "compare")},
        "inspect": [str(converted), "--verify"],
        "fetch": ["someone/some-model"],
        "report": [str(converted), "--html", str(place / "r.html"), "--tokens", "96", "--text", str(text)],
        "sweep": sweep,
        "analyze": [*model, *analyze, *output("analyze")],
        "finetune": [*model, *finetune, *output("finetune")],
        "frontier": ["--model", str(dense), *grid, *output("frontier")],
        "pretrain": [*pretrain, *output("pretrain")],
        "recover": [*model, "--text", str(text), *steps, *output("recover")],
        "tune": [*model, "--text", str(text), *steps, *output("tune")],
    }


LONG = (
    *("convert", "export", "extend", "prune", "compare", "inspect", "fetch", "report", "sweep"),
    *("analyze", "finetune", "frontier", "pretrain", "recover", "tune"),
)
"""Those of `long_commands`."""


def runs(folder: Path, arm: str) -> Path:
    """An arm's run folders, made up."""
    return write_run(folder / arm, seeds=range(2), examples=40)


def sweep_file(path: Path) -> Path:
    """A sweep of one arm."""
    path.write_text("base: {model: bert-base, task: sentiment}\narms: {vanilla: {method: vanilla}}\nseeds: 0:4\n")
    return path
