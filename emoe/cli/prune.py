"""`emoe prune`."""

from __future__ import annotations

from typing import Any

from emoe.checkpoint.given import WITH_EXPERTS
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.cli.training import perform
from emoe.config import PruneConfig
from emoe.surgery.asked import check_pruning


@with_settings(settings=PruneConfig)
def prune(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Take modules out of a model: those that a text does not use.

    What that cost is the difference of the perplexities that `emoe analyze` prints of both models.
    """
    perform(
        PruneConfig,
        flags,
        config,
        json_output,
        quiet,
        "emoe.surgery.prune:prune",
        "print_surgery",
        model=WITH_EXPERTS,
        check=check_pruning,
    )
