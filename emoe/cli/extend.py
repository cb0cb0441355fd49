"""`emoe extend`."""

from __future__ import annotations

from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import ExtendConfig


@with_settings(settings=ExtendConfig)
def extend(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Add new random modules to a model; what it has stays as it is, bit for bit."""
    perform(ExtendConfig, flags, config, json_output, quiet, "emoe.surgery.extend:extend", "print_surgery", says=True)
