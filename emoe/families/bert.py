"""BERT and its sentence encoders: plain GELU with biases, output LayerNorm outside the FFN."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="bert",
    base_prefix="bert",
    layers="encoder.layer",
    ffn="",
    host="bert-layer",
    up="intermediate.dense",
    down="output.dense",
    old_spellings=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    encoder=True,
    adds_output=False,
)
