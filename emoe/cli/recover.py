"""`emoe recover`."""

from __future__ import annotations

import json
from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import RecoverConfig, merge_settings


@with_settings(settings=RecoverConfig)
def recover(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Train a converted model on plain text, with the dense model as its teacher."""
    settings = merge_settings(RecoverConfig, flags, config)

    from emoe.cli.progress import progress_bar, silence_libraries

    silence_libraries()
    from emoe.finetune.recover import recover as run

    with progress_bar(quiet, unit="steps") as show:
        report = run(settings, show)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.tables import print_recovery

        print_recovery(report)
        for note in report["notes"]:
            print(f"note: {note}")
        print(f"written: {settings.output}")
