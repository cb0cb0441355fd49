"""`emoe tune`."""

from __future__ import annotations

import json
from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import TuneConfig, merge_settings


@with_settings(settings=TuneConfig)
def tune(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a model further on plain text: all of it, its gates, what `emoe extend` added, or LoRA."""
    settings = merge_settings(TuneConfig, flags, config)

    from emoe.cli.progress import progress_bar, silence_libraries

    silence_libraries()
    from emoe.finetune.plain_text import tune as run

    with progress_bar(quiet, unit="steps") as show:
        report = run(settings, show)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.tables import print_tuning

        print_tuning(report)
        for note in report["notes"]:
            print(f"note: {note}")
        print(f"written: {settings.output}")
