"""GPT-J: plain GELU with biases, parallel to attention."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gptj",
    base_prefix="transformer",
    layers="h",
    up="fc_in",
    down="fc_out",
    dropout="dropout",
    activation_key="activation_function",
    width_keys=("n_inner",),
    layer_returns_tuple=True,
)
