"""GPT-NeoX and Pythia: plain GELU with biases, parallel to attention."""

from emoe.families.spec import FamilySpec

SPEC = FamilySpec(
    model_type="gpt_neox",
    base_prefix="gpt_neox",
    layers="layers",
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    old_spellings=(("lm_head.", "embed_out."),),
)
