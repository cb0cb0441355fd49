"""Progress of long work, on standard error: a bar with time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from emoe._on_import import after_import

LINE_SECONDS = 10.0
"""Least seconds between two lines where there is no terminal."""

FINETUNING = {"cutting": "layers", "scoring": "sets"}
"""Stages of `emoe finetune` that count no steps, and what they count."""

COMPARING = dict.fromkeys(("reading", "resampling"), "domains")
"""Stages of `emoe report` that count no layers."""


@contextlib.contextmanager
def progress_bar(
    quiet: bool, unit: str = "layers", others: dict[str, str] | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``show(stage, done, total)``.

    Args:
        unit: what is counted.
        others: first word of a stage → what is counted there instead.
    """

    def unit_of(stage: str) -> str:
        return (others or {}).get(re.split(r"\W", stage)[0], unit)

    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _terminal(unit_of) as show:
            yield show
    else:
        yield _lines(unit_of)


@contextlib.contextmanager
def _terminal(unit_of: Callable[[str], str]) -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # A layer of a large model takes a minute: rich's own 30 s would see no two of them, and no time left.
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=1800) as bar:
        task = bar.add_task("starting", total=None, unit=unit_of("starting"))
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total, unit=unit_of(stage)
        )


def _lines(unit_of: Callable[[str], str]) -> Callable[[str, int, int], None]:
    start = time.monotonic()
    printed, counted, since, before, seen = 0.0, "", start, 0, start

    def show(stage: str, done: int, total: int) -> None:
        nonlocal printed, counted, since, before, seen
        now, unit = time.monotonic(), unit_of(stage)
        if (counted and unit != counted) or done < before:  # another count has begun, with a time left of its own
            since = seen if done else now
        counted, before, seen = unit, done, now
        if now - printed >= LINE_SECONDS or stage == "done":
            printed = now
            left = f", about {(now - since) * (total - done) / done:.0f} s left" if 0 < done < total else ""
            print(f"  {done}/{total} {unit}, {stage}, {now - start:.0f} s{left}", file=sys.stderr, flush=True)

    return show


def silence_libraries() -> None:
    """Other libraries' bars and advice do not belong in our output."""
    import os

    # `datasets` reads these when it is imported, which only some commands need.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:  # somebody has imported it before
        sys.modules["datasets"].disable_progress_bars()
    for name in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, and of torchao's own enumerations
        logging.getLogger(name).setLevel(logging.ERROR)
    # peft asks for what transformers has renamed: nothing that our user could change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # Qwen2-MoE without shared experts has such tensors
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op", category=UserWarning)
    # Importing transformers takes seconds, which a call that is refused need not.
    after_import("transformers.utils.logging", _silence_transformers)
    after_import("huggingface_hub.utils.logging", _silence_hub)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _silence_hub() -> None:
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
