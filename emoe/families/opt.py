"""OPT: plain ReLU with biases; the two linears lie in the layer itself."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="opt",
    base_prefix="model",
    layers="decoder.layers",
    ffn="",
    host="opt-layer",
    up="fc1",
    down="fc2",
    activation_key="activation_function",
    width_keys=("ffn_dim",),
    adds_output=False,
)
