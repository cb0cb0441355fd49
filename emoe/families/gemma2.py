"""Gemma 2: GeGLU with the tanh approximation."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gemma2",
    base_prefix="model",
    layers="layers",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    activation_key="hidden_activation",
    adds_output=False,
)
