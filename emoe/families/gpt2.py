"""GPT-2: plain GELU, biases, weights stored transposed (Conv1D)."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gpt2",
    base_prefix="transformer",
    layers="h",
    up="c_fc",
    down="c_proj",
    transposed=True,
    dropout="dropout",
    activation_key="activation_function",
    width_keys=("n_inner",),
)
