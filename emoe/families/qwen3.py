"""Qwen3 (dense): SwiGLU without biases."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="qwen3",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
