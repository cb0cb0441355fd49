"""`emoe finetune`."""

from __future__ import annotations

import json
import sys
from typing import Any

from emoe.assets.resolve import check_name
from emoe.checkpoint.given import given_output
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import merge_settings
from emoe.finetuning.settings import FinetuneConfig


@with_settings(settings=FinetuneConfig)
def finetune(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Fine-tune on a labelled task, dense or as a mixture of experts, and score in and out of domain."""
    settings = merge_settings(FinetuneConfig, flags, config)
    _refuse_early(settings)

    from emoe.cli.progress import FINETUNING, progress_bar
    from emoe.finetuning.tune import finetune as run

    with progress_bar(quiet, "steps", FINETUNING) as show:
        records = run(settings, show, None if quiet else lambda line: print(line, file=sys.stderr))
    if json_output:
        print(json.dumps(records, indent=2))
    elif not quiet:
        from emoe.report.scores import print_runs

        print_runs(records)
        print(f"written: {settings.output}")


def _refuse_early(settings: FinetuneConfig) -> None:
    """Raise `UserError` for names that nothing has, before torch is imported."""
    from emoe import tasks
    from emoe.finetuning import arms

    arms.get(settings.method)
    tasks.get(settings.task)
    given_output(settings.output)
    if not settings.resume:  # what is finished needs its model no more
        check_name(settings.model)
