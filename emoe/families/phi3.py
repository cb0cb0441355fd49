"""Phi-3: SwiGLU with gate and up fused into one matrix."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="phi3",
    base_prefix="model",
    layers="layers",
    up="gate_up_proj",
    down="down_proj",
    fused=True,
)
