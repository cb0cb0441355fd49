"""Gemma 3, text models: GeGLU with the tanh approximation; local and global layers alternate."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gemma3_text",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    activation_key="hidden_activation",
    adds_output=False,
)
