"""The model card (README.md) of a converted checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from emoe.runtime import write_text

if TYPE_CHECKING:
    from emoe.conversion.plan import Plan


def source_licence(folder: Path) -> str | None:
    """The licence that the source's own card states in its front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*([\w.\-]+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def write_card(report: dict, plan: Plan, path: Path) -> None:
    """Render ``card.md.jinja`` from the report; nothing in it changes when the same conversion is run again."""
    import jinja2

    import emoe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emoe.report", "."), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("card.md.jinja").render(
        report=report,
        licence=source_licence(plan.reader.folder),
        version=emoe.__version__,
        encoder=plan.reader.spec.encoder,
        name=re.sub(r"[^\w.\-/ ]", "", report["model"]),
    )
    write_text(path, text)
