"""GPT-Neo: plain GELU with biases; local and global attention alternate."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gpt_neo",
    base_prefix="transformer",
    layers="h",
    up="c_fc",
    down="c_proj",
    dropout="dropout",
    activation_key="activation_function",
    layer_returns_tuple=True,
)
