"""The shapes against the parameter counts that the models' authors publish."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from emoe.assets.aliases import ALIASES
from emoe.assets.shapes import SHAPES
from emoe.families import FAMILIES


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name):
    alias = ALIASES[name]
    fields = alias.shape
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = AutoModel if alias.family in ("bert", "roberta") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    if config.tie_word_embeddings:
        model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == alias.parameters


def test_every_alias_names_a_family_that_can_be_converted():
    assert {alias.family for alias in ALIASES.values()} <= set(FAMILIES)
    for alias in ALIASES.values():
        assert alias.shape is not None and alias.shape["model_type"] == alias.family


def test_a_shape_is_a_copy():
    ALIASES["gpt2"].shape["n_embd"] = 0
    assert ALIASES["gpt2"].shape["n_embd"] == 768
