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
    text = _render(
        "card.md.jinja",
        report=report,
        licence=source_licence(plan.reader.folder),
        encoder=plan.reader.spec.encoder,
        name=_harmless(report["model"]),
    )
    write_text(path, text)


def write_export_card(report: dict, config: dict, source: Path, path: Path) -> None:
    """The card of an export: what it is, how it was verified, where it comes from, the source's licence.

    Args:
        report: what `emoe.export` returns.
        config: config.json of the converted checkpoint.
        source: its folder.
    """
    provenance = config.get("emoe_provenance") or {}
    text = _render(
        "export_card.md.jinja",
        report=report,
        provenance=provenance,
        config=config,
        licence=source_licence(source),
        name=_harmless(str(provenance.get("source", source.name))),
    )
    write_text(path, text)


def _harmless(name: str) -> str:
    """A name from a file that others wrote, without what Markdown or HTML would take for its own."""
    return re.sub(r"[^\w.\-/ ]", "", name)


def _render(template: str, **values: object) -> str:
    import jinja2

    import emoe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emoe.report", "."), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(version=emoe.__version__, **values)
