"""The model card (README.md) of a checkpoint: converted, exported, pruned, extended, trained further or anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from emoe.checkpoint.companions import licence_of, title_of
from emoe.checkpoint.names import names_only
from emoe.plainfiles import read_json
from emoe.report.history import history_line
from emoe.report.tables import groups_line
from emoe.runtime import format_bytes, write_text

if TYPE_CHECKING:
    from emoe.conversion.plan import Plan

DONE = {"prune": "pruned", "extend": "extended", "recover": "recovered", "tune": "tuned", "finetune": "fine-tuned"}
"""What the title says of the last verb."""

GROUPS = {"emoe_groups": "experts", "att_groups": "attention experts", "mlp_groups": "FFN experts"}
"""Fields of config.json that hold how many modules each layer has after surgery."""


def write_card(report: dict, plan: Plan, path: Path) -> None:
    """Render ``card.md.jinja`` from the report; nothing in it changes when the same conversion is run again."""
    text = _render(
        "card.md.jinja",
        report=report,
        size=format_bytes(report["gate_bytes"]),
        licence=_front(plan.licence),
        encoder=plan.reader.spec.encoder,
        title=title_of({"source": plan.origin}, plan.reader.folder),
    )
    write_text(path, text)


def write_export_card(report: dict, config: dict, source: Path, path: Path) -> None:
    """The card of an export: what it is, how it was verified, where it comes from, the source's licence.

    Args:
        report: what `emoe.export` returns.
        config: config.json of the converted checkpoint.
        source: its folder.
    """
    provenance = names_only(config.get("emoe_provenance") or {})
    licence = licence_of(source, provenance)
    text = _render(
        "export_card.md.jinja",
        report=report,
        size=format_bytes(report["bytes"]),
        provenance=provenance,
        history=[history_line(step) for step in provenance.get("history", [])],
        config=config,
        auto_class=_auto_class(config),
        licence=_front(licence),
        licence_name=_named(licence),
        title=title_of(provenance, source),
        name=provenance.get("source", source.name),
    )
    write_text(path, text)


def write_history_card(folder: Path, source: Path, report: dict[str, Any]) -> None:
    """The card of a checkpoint that was made from another one: what was done since the conversion, and the licence.

    Args:
        folder: holds config.json and the verb's report already; gets the card.
        source: the checkpoint that it was made from.
        report: the verb's; has the provenance of a stock model, whose config.json has none.
    """
    config = read_json(folder / "config.json")
    provenance = names_only(config.get("emoe_provenance") or report["provenance"])
    licence = licence_of(source, provenance)
    text = _render(
        "history_card.md.jinja",
        title=title_of(provenance, source),
        name=provenance.get("source", source.name),
        licence=_front(licence),
        licence_name=_named(licence),
        remote_code="auto_map" in config,
        groups={kind: groups_line(config[key]) for key, kind in GROUPS.items() if config.get(key)},
        provenance=provenance,
        history=[history_line(step) for step in provenance["history"]],
        reports=sorted(path.name for path in folder.glob("emoe_*.json")),
        done=DONE.get(provenance["history"][-1].get("verb"), "changed"),
        auto_class=_auto_class(config),
    )
    write_text(folder / "README.md", text)


def write_pretraining_card(report: dict[str, Any], folder: Path) -> None:
    """The card of a model that `emoe pretrain` made; ``report`` is its own, ``folder`` holds config.json already."""
    remote_code = "auto_map" in read_json(folder / "config.json")
    text = _render("pretraining_card.md.jinja", report=report, remote_code=remote_code)
    write_text(folder / "README.md", text)


def _auto_class(config: dict[str, Any]) -> str:
    """The class of transformers that loads the checkpoint with its head."""
    name = (config.get("architectures") or [""])[0].replace("LMHeadModel", "ForCausalLM")
    heads = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM")
    return "AutoModel" + next((head for head in heads if name.endswith(head)), "")


def _front(licence: dict[str, Any]) -> str:
    """A licence as lines of front matter."""
    return yaml.safe_dump(licence, sort_keys=False, width=10_000, allow_unicode=True) if licence else ""


def _named(licence: dict[str, Any]) -> str:
    """A licence in a line of text."""
    named = licence.get("license_name") or licence.get("license") or "see the source"
    return named if isinstance(named, str) else " and ".join(named)


def _harmless(value: object) -> str:
    """A value as text in one line, without what Markdown or HTML would take for its own: others wrote config.json."""
    return re.sub(r"""[^\w.,;:=+\-–/@()%'" ]""", "", re.sub(r"\s+", " ", str(value)))


def _render(template: str, **values: object) -> str:
    """A card. Every value is made harmless on its way in, but for those that the template calls ``safe``."""
    import jinja2
    from markupsafe import Markup

    import emoe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emoe.report", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _harmless(value),
    )
    return environment.get_template(template).render(version=emoe.__version__, **values)
