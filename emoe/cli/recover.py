"""`emoe recover`."""

from __future__ import annotations

from typing import Any

from emoe.checkpoint.given import CONVERTED
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import RecoverConfig


@with_settings(settings=RecoverConfig)
def recover(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a converted model on plain text, with the dense model as its teacher."""
    perform(
        RecoverConfig,
        flags,
        config,
        json_output,
        quiet,
        "emoe.finetuning.recover:recover",
        "print_recovery",
        model=CONVERTED,
    )
