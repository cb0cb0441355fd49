"""The commands as functions: ``emoe.finetune(model, task, output)``. Settings are the flags, with underscores.

Every function takes ``progress``, called with stage, done, total, and raises `UserError` on bad input; the message
names the command's flag for the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.config import (
    AnalyzeConfig,
    ExtendConfig,
    PretrainConfig,
    PruneConfig,
    RecoverConfig,
    Settings,
    TuneConfig,
    merge_settings,
)

if TYPE_CHECKING:
    from emoe.evaluation.compare import Comparison

Progress = Callable[[str, int, int], None]
Report = dict[str, Any]


def finetune(
    model: str | Path, task: str | Path, output: str | Path, *, progress: Progress | None = None, **settings: Any
) -> list[Report]:
    """Fine-tune on a labelled task and score in and out of domain; `FinetuneConfig` has the settings.

    Returns:
        The record of each seed, as in its run.json.
    """
    from emoe.finetuning.settings import FinetuneConfig
    from emoe.finetuning.tune import finetune as run

    return run(_merged(FinetuneConfig, settings, model=model, task=task, output=output), progress)


def evaluate(model: str | Path, task: str | Path = "", *, progress: Progress | None = None, **settings: Any) -> Report:
    """Score a run, or a model with a classification head; `EvalConfig` has the settings."""
    from emoe.finetuning.evaluate import evaluate as run
    from emoe.finetuning.settings import EvalConfig

    return run(_merged(EvalConfig, settings, model=model, task=task), progress)


def compare(
    runs: Sequence[str | Path],
    *,
    baseline: str | None = None,
    reading: str = "as-trained",
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare fine-tuned runs with the first, or with ``baseline``; ``print`` shows the result as Markdown."""
    from emoe.evaluation.compare import compare as run
    from emoe.evaluation.runs import read_runs

    return run(read_runs([str(folder) for folder in runs], reading), baseline, resamples, seed, progress or _silent)


def recover(model: str | Path, output: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Teach a converted model what the dense one says; `RecoverConfig` has the settings."""
    from emoe.finetuning.recover import recover as run

    return run(_merged(RecoverConfig, settings, model=model, output=output), progress or _silent)


def tune(model: str | Path, output: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Train further on plain text, whole or in part; `TuneConfig` has the settings."""
    from emoe.finetuning.plain_text import tune as run

    return run(_merged(TuneConfig, settings, model=model, output=output), progress or _silent)


def analyze(
    model: str | Path, domains: dict[str, str], output: str | Path, *, progress: Progress | None = None, **settings: Any
) -> Report:
    """Which experts a model uses on which text; `AnalyzeConfig` has the settings.

    Args:
        domains: name → text, as for ``emoe convert --calibration``.
    """
    from emoe.analysis.analyze import analyze as run
    from emoe.report.usage import write_usage

    named = [f"{name}={text}" for name, text in domains.items()]
    config = _merged(AnalyzeConfig, settings, model=model, output=output, domains=named)
    return run(config, progress or _silent, write_usage)


def prune(model: str | Path, output: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Take out what a task does not use; `PruneConfig` has the settings."""
    from emoe.surgery.prune import prune as run

    return run(_merged(PruneConfig, settings, model=model, output=output), progress or _silent)


def extend(model: str | Path, output: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Add modules that change nothing before they are trained; `ExtendConfig` has the settings."""
    from emoe.surgery.extend import extend as run

    return run(_merged(ExtendConfig, settings, model=model, output=output), progress or _silent)


def pretrain(
    corpus: Sequence[str],
    architecture: dict[str, Any],
    output: str | Path,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Train a new language model on plain text; `PretrainConfig` has the settings."""
    from emoe.pretraining.train import pretrain as run

    config = _merged(PretrainConfig, settings, corpus=list(corpus), architecture=architecture, output=output)
    return run(config, progress or _silent)


def _merged(kind: type[Settings], settings: dict[str, Any], **named: Any) -> Any:
    return merge_settings(kind, {**settings, **named})


def _silent(stage: str, done: int, total: int) -> None:
    pass
