"""Llama 1 to 3, SmolLM, TinyLlama, Yi: SwiGLU without biases."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="llama",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
