"""Qwen2 and Qwen2.5: SwiGLU; biases in attention only."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="qwen2",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
