"""What trains of an extended model is what was added, and all else is watched to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.tiny import tiny_checkpoint

import emoe
from emoe.surgery.joined import Part
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import SPLIT, train_only

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


def _old(whole: torch.Tensor, part: Part | None) -> torch.Tensor:
    """Mask of a tensor's entries that do not train."""
    mask = torch.ones(whole.shape, dtype=torch.bool)
    return mask if part is None else mask.index_fill_(part.axis, part.index_M, False)


@pytest.mark.parametrize("what", ["new-modules", "new-experts"])
def test_what_was_added_trains_alone(what, extended):
    """Of a tensor that partly trains, what does not is the tensor before the extension, entry by entry."""
    name, source, folder = extended
    model, before = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, source))
    frozen = train_only(model, anatomy_of(folder), what)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert (sum(rows.numel() for rows in trained), len(trained)) == ADDED[name, what]
    assert len(frozen.parts) == len(trained)
    for parameter_name, part in frozen.parts.items():
        old = part.parameter[_old(part.parameter, part)]
        assert torch.equal(old, before.state_dict()[parameter_name].flatten())


@torch.no_grad()
def test_every_change_is_seen_but_of_what_trains(extended):
    _, _, folder = extended
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = train_only(model, anatomy_of(folder), "new-modules")
    for own_name, parameter in model.named_parameters():
        start, name = parameter.clone(), SPLIT.sub(r"\1", own_name)
        if parameter.requires_grad:
            parameter += 1
            continue
        for place in _old(parameter, frozen.parts.get(name)).nonzero()[[0, -1]]:
            parameter[tuple(place)] += 1e-3
            with pytest.raises(RuntimeError, match=f"{name} was to stay as it is"):
                frozen.check(model)
            parameter.copy_(start)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, part in frozen.parts.items():  # joined with rows that are larger by 1
        grown = part.parameter - whole.state_dict()[name]
        torch.testing.assert_close(grown, (~_old(grown, part)).float())
    frozen.check(model)
