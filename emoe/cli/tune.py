"""`emoe tune`."""

from __future__ import annotations

from typing import Any

from emoe.checkpoint.given import CAUSAL
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import TuneConfig


@with_settings(settings=TuneConfig)
def tune(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a model further on plain text: all of it, its gates, what `emoe extend` added, or LoRA."""
    perform(
        TuneConfig, flags, config, json_output, quiet, "emoe.finetuning.plain_text:tune", "print_tuning", model=CAUSAL
    )
