"""`emoe estimate`."""

from __future__ import annotations

import json
from typing import Any

from emoe.assets.resolve import check_name
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import resolve_config

_NOT_HERE = frozenset({"output", "resume", "overwrite", "dry_run", "checkpoint_seconds", "cache_limit"})


@with_settings(leave_out=_NOT_HERE)
def estimate(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Say what a conversion will take, before anything is loaded; with --quiet only whether it is possible."""
    settings, note = resolve_config(flags, config)
    check_name(settings.model)

    from emoe.conversion.estimate import estimate as compute
    from emoe.runtime import format_bytes

    costs = compute(settings)
    if json_output:
        print(json.dumps(costs.to_json(), indent=2))
        return
    if quiet:
        return
    print(note)
    print(f"model:       {costs.model}, {costs.parameters / 1e6:,.0f} M parameters, {costs.layers} layers")
    print(f"one layer:   {format_bytes(costs.layer_bytes)}")
    print(f"peak memory: {format_bytes(costs.memory_bytes)}")
    print(f"disk:        {format_bytes(costs.disk_bytes)}, and {format_bytes(costs.working_disk_bytes)} while it runs")
    print(f"time:        about {costs.seconds / 60:.1f} min on this machine")
