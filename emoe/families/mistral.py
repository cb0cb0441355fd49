"""Mistral: SwiGLU without biases."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="mistral",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
