"""`emoe pretrain`."""

from __future__ import annotations

from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import PretrainConfig


@with_settings(leave_out=frozenset({"architecture"}), settings=PretrainConfig)
def pretrain(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a new language model, ModuleFormer or other, on plain text; its architecture stands in --config."""
    perform(PretrainConfig, flags, config, json_output, quiet, "emoe.pretraining.train:pretrain", "print_pretraining")
