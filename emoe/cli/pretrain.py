"""`emoe pretrain`."""

from __future__ import annotations

import json
from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import PretrainConfig, merge_settings


@with_settings(leave_out=frozenset({"architecture"}), settings=PretrainConfig)
def pretrain(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a new language model, ModuleFormer or other, on plain text; its architecture stands in --config."""
    settings = merge_settings(PretrainConfig, flags, config)

    from emoe.cli.progress import progress_bar, silence_libraries

    silence_libraries()
    from emoe.pretrain.train import pretrain as run

    with progress_bar(quiet, unit="steps") as show:
        report = run(settings, show)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.tables import print_pretraining

        print_pretraining(report)
        print(f"written: {settings.output}")
