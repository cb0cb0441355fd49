"""`emoe extend`."""

from __future__ import annotations

import json
from typing import Any

from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import ExtendConfig, merge_settings


@with_settings(settings=ExtendConfig)
def extend(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Add new random modules to a model; what it has stays as it is, bit for bit."""
    settings = merge_settings(ExtendConfig, flags, config)

    from emoe.cli.progress import progress_bar, silence_libraries

    silence_libraries()
    from emoe.surgery.extend import extend as run

    with progress_bar(quiet, unit="steps") as show:
        report = run(settings, show)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.tables import print_surgery

        print_surgery(report)
        for note in report["notes"]:
            print(f"note: {note}")
        print(f"written: {settings.output}")
