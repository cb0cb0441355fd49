"""A model without some of its layers is the model in which those do nothing, whatever a layer's number stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.gates import starve
from support.tiny import tiny_checkpoint

import emoe
from emoe.cli.main import main

SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
WINDOWS = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "gpt_neo": {"window_size": 8},
}
"""Family → changes with which its layers attend within 8 tokens or to all, by their numbers."""


def converted(folder: Path, family: str, settings: dict, derived: bool, **changes) -> Path:
    """A tiny converted model; with `derived` its config.json leaves the layers' kinds to transformers."""
    dense = tiny_checkpoint(folder / "dense", family, **changes)
    if derived:
        config = json.loads((dense / "config.json").read_text())
        left = {key: value for key, value in config.items() if key not in ("layer_types", "attention_layers")}
        (dense / "config.json").write_text(json.dumps(left))
    emoe.convert(str(dense), output=folder / "moe", **settings)
    return folder / "moe"


def logits(model) -> torch.Tensor:
    tokens = torch.randint(5, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def bypassed(folder: Path, kept: list[int]) -> torch.nn.Module:
    """The model with all other layers handing on what they get."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    hand_on = lambda x, *arguments, **keywords: (x,) if "gpt_neo" in model.config.model_type else x  # noqa: E731
    for number, layer in enumerate(layers):
        if number not in kept:
            layer.forward = hand_on
    return model


@pytest.mark.parametrize("derived", [True, False])
@pytest.mark.parametrize("family", WINDOWS)
def test_layers_keep_their_attention(family, derived, settings, run, tmp_path):
    whole = converted(tmp_path, family, settings, derived, **WINDOWS[family])
    small = run("prune", whole, "small", "--method", "layers-uniform", "--keep", 0.75)
    kept = json.loads((small / "emoe_prune.json").read_text())["layers"]
    assert kept == [0, 2, 3]
    expected = logits(bypassed(whole, kept))
    assert not torch.allclose(expected, logits(bypassed(whole, [0, 1, 2, 3])), atol=0.1)
    found = transformers.AutoModelForCausalLM.from_pretrained(small).eval()
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)


def test_attention_scaled_by_the_layer_cannot_move(settings, run, tmp_path, capsys):
    whole = converted(tmp_path, "gpt2", settings, False, scale_attn_by_inverse_layer_idx=True)
    flags = ["prune", "--model", whole, "--output", tmp_path / "small", "--keep", 0.75, "--method", "layers-uniform"]
    assert main([*map(str, flags)]) == 2
    assert "--method: this model divides attention by the layer's number" in capsys.readouterr().err
    top = run("prune", whole, "top", "--method", "layers-top", "--keep", 0.75)
    found = transformers.AutoModelForCausalLM.from_pretrained(top).eval()
    torch.testing.assert_close(logits(found), logits(bypassed(whole, [0, 1, 2])), rtol=0, atol=1e-5)


def test_the_widest_layer_may_go(tiny_llama, settings, run, text, tmp_path):
    """Tables with a row for each budget go down to the experts of the widest layer that stays."""
    emoe.convert(str(tiny_llama), output=tmp_path / "moe", **settings, routing="threshold")
    starve(tmp_path / "moe", [1, 6], [0, 3])
    uneven = run("prune", tmp_path / "moe", "uneven", *text, "--threshold", 1e-9, "--count", "hard")
    small = run("prune", uneven, "small", "--method", "layers-uniform", "--keep", 0.5)
    assert [json.loads((f / "config.json").read_text())["num_experts"] for f in (uneven, small)] == [8, 6]
    found = transformers.AutoModelForCausalLM.from_pretrained(small).eval()
    torch.testing.assert_close(logits(found), logits(bypassed(uneven, [0, 3])), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "keys"), [("converted_llama", ["num_experts_per_tok"]), ("tiny_moduleformer", ["k_att", "k_mlp"])]
)
def test_top_k_is_applied(model, keys, request, run, capsys, tmp_path):
    folder = request.getfixturevalue(model)
    small = run("prune", folder, "small", "--method", "layers-top", "--keep", 0.5, "--top-k", 1)
    config = json.loads((small / "config.json").read_text())
    assert [config[key] for key in keys] == [1] * len(keys)
    assert json.loads((small / "emoe_prune.json").read_text())["settings"]["top_k"] == 1
    flags = ["--output", tmp_path / "none", "--method", "layers-top", "--keep", 0.5, "--top-k", 9]
    assert main(["prune", "--model", str(folder), *map(str, flags)]) == 2
    assert "--top-k: 9 is more than the" in capsys.readouterr().err
