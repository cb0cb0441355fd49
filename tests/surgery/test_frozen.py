"""What trains of an extended model is what was added, and all else is watched to the bit."""

from __future__ import annotations

import pytest
import torch
import transformers

from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import train_only, trained_entries

ADDED = {
    ("converted_llama", "new-modules"): (4 * 2 * (3 * 32 * 6 + 33), 4 * 5),
    ("converted_llama", "new-experts"): (4 * 2 * 3 * 32 * 6, 4 * 3),
    ("tiny_moduleformer", "new-modules"): (3 * 2 * (2 * 32 * 24 + 32), 3 * 3),
    ("tiny_moduleformer", "new-experts"): (3 * 2 * 2 * 32 * 24, 3 * 2),
}
"""Weights of two new experts in each layer, and tensors that they lie in: matrices and a gate row (and its bias)."""


@pytest.fixture(params=["converted_llama", "tiny_moduleformer"])
def extended(request, run):
    return request.param, run("extend", request.getfixturevalue(request.param), "big", "--experts", 2)


@pytest.mark.parametrize("what", ["new-modules", "new-experts"])
def test_every_bit_but_of_what_trains_is_watched(what, extended):
    name, folder = extended
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = train_only(model, anatomy_of(folder), what)
    entries, tensors = ADDED[name, what]
    assert trained_entries(model, frozen) == entries
    assert sum(parameter.requires_grad for parameter in model.parameters()) == tensors
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            before = parameter.clone()
            mask = frozen.masks.get(parameter_name, torch.zeros(()))
            assert parameter.requires_grad == bool(mask.any())
            parameter.copy_(torch.where(mask.expand_as(parameter) != 0, parameter + 1, parameter))
            frozen.check(model)
            old = (mask.expand_as(parameter) == 0).nonzero()
            for place in (old[0], old[-1]):
                parameter[tuple(place)] += 1e-3
                with pytest.raises(RuntimeError, match=f"{parameter_name} was to stay as it is"):
                    frozen.check(model)
                parameter.copy_(before)
            frozen.check(model)
