"""`emoe extend`."""

from __future__ import annotations

from typing import Any

from emoe.checkpoint.given import WITH_EXPERTS
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import ExtendConfig
from emoe.surgery.asked import check_extension


@with_settings(settings=ExtendConfig)
def extend(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Add new random modules to a model; what it has stays as it is, bit for bit."""
    perform(
        ExtendConfig,
        flags,
        config,
        json_output,
        quiet,
        "emoe.surgery.extend:extend",
        "print_surgery",
        model=WITH_EXPERTS,
        check=check_extension,
        says=True,
    )
