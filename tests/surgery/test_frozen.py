"""What trains of an extended model is what was added, and all else is watched to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.tiny import tiny_checkpoint

import emoe
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import train_only, trained_entries

ADDED = {
    ("converted_llama", "new-modules"): (4 * 2 * (3 * 32 * 6 + 33), 4 * 5),
    ("converted_llama", "new-experts"): (4 * 2 * 3 * 32 * 6, 4 * 3),
    ("converted_phi3", "new-modules"): (4 * 2 * (3 * 32 * 6 + 33), 4 * 4),
    ("converted_phi3", "new-experts"): (4 * 2 * 3 * 32 * 6, 4 * 2),
    ("tiny_moduleformer", "new-modules"): (3 * 2 * (2 * 32 * 24 + 32), 3 * 3),
    ("tiny_moduleformer", "new-experts"): (3 * 2 * 2 * 32 * 24, 3 * 2),
}
"""Weights of two new experts in each layer, and tensors that they lie in: matrices and a gate row (and its bias)."""


@pytest.fixture(scope="module")
def converted_phi3(settings, tmp_path_factory) -> Path:
    """Whose input matrices are fused: rows of the gate's, then of the other."""
    folder = tmp_path_factory.mktemp("phi3")
    emoe.convert(str(tiny_checkpoint(folder / "dense", "phi3")), output=folder / "moe", **settings)
    return folder / "moe"


@pytest.fixture(params=["converted_llama", "converted_phi3", "tiny_moduleformer"])
def extended(request, run):
    source = request.getfixturevalue(request.param)
    return request.param, source, run("extend", source, "big", "--experts", 2)


@pytest.mark.parametrize("what", ["new-modules", "new-experts"])
def test_all_but_what_was_added_is_masked_out(what, extended):
    """Of a tensor that partly trains, what does not is the tensor before the extension, entry by entry."""
    name, source, folder = extended
    model, before = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, source))
    frozen = train_only(model, anatomy_of(folder), what)
    entries, tensors = ADDED[name, what]
    assert trained_entries(model, frozen) == entries
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(frozen.masks) == tensors
    for parameter_name, mask in frozen.masks.items():
        parameter = model.get_parameter(parameter_name)
        old = parameter[mask.expand_as(parameter) == 0]
        assert torch.equal(old, before.state_dict()[parameter_name].flatten())


@torch.no_grad()
def test_every_change_is_seen_but_of_what_trains(extended):
    _, _, folder = extended
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = train_only(model, anatomy_of(folder), "new-modules")
    for name, parameter in model.named_parameters():
        start, mask = parameter.clone(), frozen.masks.get(name, torch.zeros(())).expand_as(parameter)
        parameter += mask
        frozen.check(model)
        for place in (mask == 0).nonzero()[[0, -1]]:
            parameter[tuple(place)] += 1e-3
            with pytest.raises(RuntimeError, match=f"{name} was to stay as it is"):
                frozen.check(model)
            parameter.copy_(start)
