"""Model families as data. A further family is one new file and one line here."""

from __future__ import annotations

from typing import Any

from emoe.errors import UserError, nearest
from emoe.families import (
    bert,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
    roberta,
)
from emoe.families.spec import FamilySpec

__all__ = ["FAMILIES", "FamilySpec", "family", "most_positions", "spec_of"]

FAMILIES: dict[str, FamilySpec] = {
    module.SPEC.model_type: module.SPEC
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3_text,
        phi3,
        gpt2,
        gpt_neo,
        gptj,
        gpt_neox,
        opt,
        bert,
        roberta,
    )
}


def family(model_type: str) -> FamilySpec:
    """The spec of a stock ``model_type``.

    Raises:
        UserError: the family is unknown, or the model is one of ours already.
    """
    if model_type.startswith("emoe_"):
        raise UserError(f"--model: this folder is converted already (model_type '{model_type}'); give its dense source")
    if model_type == "moduleformer":
        raise UserError(
            "--model: a ModuleFormer is born with experts, its FFN cannot be cut into some; train it further on plain "
            "text with `emoe tune`"
        )
    if model_type not in FAMILIES:
        hint = nearest(model_type, FAMILIES)
        raise UserError(f"--model: unknown family '{model_type}'{hint}. Known families: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def spec_of(facts: Any) -> FamilySpec | None:
    """The spec of a configuration object, stock or of a converted model; None of a family that is not known."""
    return FAMILIES.get((getattr(facts, "emoe_source", None) or {}).get("family", facts.model_type))


def most_positions(facts: Any) -> int | None:
    """Tokens that a model of this config has positions for; None where there is no limit."""
    longest, spec = getattr(facts, "max_position_embeddings", None), spec_of(facts)
    return longest - (spec.position_offset if spec else 0) if longest else None
