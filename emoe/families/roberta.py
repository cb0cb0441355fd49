"""RoBERTa: as BERT, with its own embeddings."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="roberta",
    base_prefix="roberta",
    layers="encoder.layer",
    ffn="",
    host="bert-layer",
    up="intermediate.dense",
    down="output.dense",
    old_spellings=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    position_offset=2,
    encoder=True,
    adds_output=False,
)
