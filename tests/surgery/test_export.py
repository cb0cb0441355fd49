"""What pruning and extending leave loads in plain transformers, trains, and becomes a smaller stock model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from emoe.cli.main import main


def logits(folder, top_k: int | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if top_k:
        model.set_top_k(top_k)
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def export(folder, output, *flags) -> int:
    return main(["export", "--model", str(folder), "--output", str(output), "--to", "dense", "--quiet", *flags])


def test_a_pruned_model_becomes_a_smaller_stock_llama(converted_llama, tiny_llama, run, text, tmp_path):
    small = run("prune", converted_llama, "small", *text, "--keep", 0.5, "--scope", "layer")
    assert export(small, tmp_path / "dense") == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 24)
    assert not [key for key in config if key.startswith("emoe_")]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(small, top_k=4), rtol=0, atol=2e-5)
    # The neurons that are left stand in the source's order.
    whole = {n: t for p in tiny_llama.glob("*.safetensors") for n, t in load_file(p).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    rows = [whole[name].tolist().index(row) for row in model.state_dict()[name].tolist()]
    assert rows == sorted(rows)


def test_widths_that_differ(converted_llama, run, text, tmp_path, capsys):
    small = run("prune", converted_llama, "small", *text, "--keep", 0.6)
    groups = json.loads((small / "config.json").read_text())["emoe_groups"]
    assert len({tuple(group) for group in groups}) > 1
    assert export(small, tmp_path / "dense") == 2
    assert "prune all layers with --scope layer, or add --pad" in capsys.readouterr().err
    assert export(small, tmp_path / "dense", "--pad") == 0
    written = [
        tensor.nbytes for path in (tmp_path / "dense").glob("*.safetensors") for tensor in load_file(path).values()
    ]
    assert json.loads((tmp_path / "dense" / "emoe_export.json").read_text())["bytes"] == sum(written)
    most = max(group[0] for group in groups)
    torch.testing.assert_close(
        logits(tmp_path / "dense"), logits(small, top_k=most), rtol=0, atol=1e-4
    )  # fp32, logits to 30


def test_an_extended_model_becomes_a_wider_one(converted_llama, run, tmp_path):
    big = run("extend", converted_llama, "big", "--experts", 2)
    assert export(big, tmp_path / "dense") == 0
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["intermediate_size"] == 60
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(converted_llama, top_k=8), rtol=0, atol=1e-4)


def test_taking_back_gives_the_source_bit_for_bit(converted_llama, tiny_llama, run, tmp_path, capsys):
    back = run("prune", run("extend", converted_llama, "big", "--experts", 2), "back", "--remove", "added")
    assert main(["export", "--model", str(back), "--output", str(tmp_path / "dense"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] == 4
    source = {n: t for p in tiny_llama.glob("*.safetensors") for n, t in load_file(p).items()}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, source[name])


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_pruned_models_tune_and_are_pruned_again(converted_llama, run, text, scope, capsys):
    small = run("prune", converted_llama, "small", *text, "--keep", 0.6, "--scope", scope)
    flags = ("--steps", 3, "--tokens-per-step", 128, "--sequence-length", 64, "--held-out-tokens", 128)
    tuned = run("tune", small, "tuned", *text[:2], *flags)
    again = run("prune", tuned, "again", *text, "--keep", 0.5, "--scope", scope)
    bigger = run("extend", again, "bigger", "--experts", 1)
    assert torch.isfinite(logits(bigger)).all()
    assert main(["inspect", str(bigger)]) == 0
    shown = capsys.readouterr().out
    assert "experts by layer" in shown
    assert [f"history {n}" in shown for n in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    assert "1 ffn experts a layer" in shown


def test_magnitude_pruning_gives_a_stock_model(converted_llama, run, text):
    dense = run("prune", converted_llama, "dense", *text, "--keep", 0.5, "--method", "magnitude")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.intermediate_size == 24
    same = run("prune", converted_llama, "same", *text, "--keep", 1.0, "--method", "magnitude")
    torch.testing.assert_close(logits(same), logits(converted_llama, top_k=8), rtol=0, atol=1e-5)


def test_magnitude_pruning_of_layers_that_differ(converted_llama, run, text, tmp_path, capsys):
    """One width for all: a fraction of all neurons, or none that some layer does not have."""
    uneven = run("prune", converted_llama, "uneven", *text, "--keep", 0.6)
    groups = json.loads((uneven / "config.json").read_text())["emoe_groups"]
    assert len({tuple(group) for group in groups}) > 1
    dense = run("prune", uneven, "dense", *text, "--keep", 0.2, "--method", "magnitude")
    width = transformers.AutoConfig.from_pretrained(dense).intermediate_size
    assert width == round(0.2 * sum(6 * group[0] for group in groups) / 4)
    flags = ["prune", "--model", uneven, "--output", tmp_path / "same", *text, "--keep", 1.0, "--method", "magnitude"]
    assert main([*map(str, flags)]) == 2
    assert "a dense model has one width; keep fewer" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "kept"), [("layers-uniform", [0, 3]), ("layers-top", [0, 1])])
def test_dropping_layers(method, kept, converted_llama, run):
    folder = run("prune", converted_llama, "shallow", "--keep", 0.5, "--method", method)
    assert json.loads((folder / "emoe_prune.json").read_text())["layers"] == kept
    small = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(converted_llama).eval()
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in kept)
    tokens = torch.randint(5, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, whole(tokens, use_cache=False).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "kept"), [("layers-uniform", [0, 2]), ("layers-top", [0, 1])])
def test_dropping_layers_of_a_moduleformer(method, kept, tiny_moduleformer, run, text):
    """One whose layers differ in their numbers of experts, since half of the model's were pruned."""
    uneven = run("prune", tiny_moduleformer, "uneven", *text, "--keep", 0.5)
    folder = run("prune", uneven, "shallow", "--keep", 0.7, "--method", method)
    assert json.loads((folder / "emoe_prune.json").read_text())["layers"] == kept
    small = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(uneven).eval()
    whole.transformer.h = torch.nn.ModuleList(whole.transformer.h[i] for i in kept)
    tokens = torch.randint(5, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, whole(tokens, use_cache=False).logits, rtol=0, atol=1e-6)


def test_without_our_packages(converted_llama, run, text, tmp_path):
    """The files beside a pruned and extended checkpoint are enough for transformers."""
    import subprocess
    import sys

    big = run("extend", run("prune", converted_llama, "small", *text, "--keep", 0.6), "big", "--experts", 2)
    code = (
        "import sys, torch, transformers\n"
        "sys.modules['emoe'] = sys.modules['emoe_kernels'] = None\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(big)!r}, trust_remote_code=True).eval()\n"
        "t = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))\n"
        f"torch.save(m(t).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, logits(big), rtol=0, atol=1e-5)
