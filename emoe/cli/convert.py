"""`emoe convert`."""

from __future__ import annotations

import json
import sys
from typing import Any

from emoe.assets.resolve import check_name
from emoe.checkpoint.given import given_output
from emoe.cli.options import ConfigFile, Json, Quiet, with_settings
from emoe.config import resolve_config


@with_settings()
def convert(flags: dict[str, Any], config: ConfigFile = None, json_output: Json = False, quiet: Quiet = False) -> None:
    """Convert a dense checkpoint into its Emergent Mixture-of-Experts."""
    settings, note = resolve_config(flags, config)
    check_name(settings.model)
    given_output(settings.output)

    from emoe.cli.progress import progress_bar
    from emoe.conversion.convert import prepare, run, workspace_of
    from emoe.runtime import require_space

    plan = prepare(settings, [note], say=None if quiet else lambda line: print(line, file=sys.stderr))
    workspace = workspace_of(plan)
    if not quiet:
        print("\n".join(plan.describe()), file=sys.stderr)
    if settings.dry_run:
        workspace.check()
        require_space(workspace.output.parent, plan.disk_bytes() - workspace.held_bytes(), "--output")
        if json_output:
            print(json.dumps({"settings": settings.model_dump(mode="json"), "disk_bytes": plan.disk_bytes()}, indent=2))
        if not quiet:
            print("dry run: every check passed, nothing was written", file=sys.stderr)
        return
    # The survey and the conversion each go through the layers, and both take their time.
    with progress_bar(quiet, "layers in two passes" if plan.needs_survey else "layers") as show:
        report = run(plan, show)
    if json_output:
        print(json.dumps(report, indent=2))
    elif not quiet:
        from emoe.report.tables import print_report

        print_report(report)
        print(f"written: {settings.output}")
