"""Layouts that real hubs are full of: no prefix, old LayerNorm names, buffers among the weights, shards, bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import tiny_checkpoint

import emoe

TOKENS = torch.randint(5, 96, (2, 20), generator=torch.Generator().manual_seed(3))


def rewrite(folder: Path, change) -> None:
    """Pass the checkpoint's tensors through `change`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gpt2_of_the_hub(tensors):
    """Names without `transformer.`, and the causal mask that old versions saved."""
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    return bare | {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(4)}


def bert_of_2018(tensors):
    """LayerNorm's weight and bias under their first names."""
    names = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in tensors
    }
    return {names[n]: t for n, t in tensors.items()}


def llama_with_rotary_buffers(tensors):
    """Rotary frequencies that old versions saved in each layer."""
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}


CASES = {
    "gpt2": (gpt2_of_the_hub, transformers.AutoModelForCausalLM),
    "bert": (bert_of_2018, transformers.AutoModelForMaskedLM),
    "llama": (llama_with_rotary_buffers, transformers.AutoModelForCausalLM),
}


@pytest.mark.parametrize("family", CASES)
def test_old_names_survive_the_round_trip(family, settings, tmp_path):
    change, auto = CASES[family]
    folder = tiny_checkpoint(tmp_path / "dense", family)
    rewrite(folder, change)
    emoe.convert(str(folder), output=tmp_path / "out", **settings)
    source, model = auto.from_pretrained(folder).eval(), auto.from_pretrained(tmp_path / "out").eval()
    model.set_top_k(8)
    with torch.no_grad():
        assert (model(TOKENS).logits - source(TOKENS).logits).abs().max() <= 1e-4
    emoe.export(tmp_path / "out", tmp_path / "back", verify_tokens=256)
    before, after = load_file(folder / "model.safetensors"), {}
    for shard in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(shard)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_without_a_head_under_a_head_s_name(settings, tmp_path):
    """A base model saved alone: names without `bert.`, architecture BertModel."""
    folder = tiny_checkpoint(tmp_path / "dense", "bert", head="AutoModel")
    report = emoe.convert(str(folder), output=tmp_path / "out", **settings)
    assert report["quality"]["measure"] == "hidden-state error"
    source = transformers.AutoModel.from_pretrained(folder).eval()
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    model.set_top_k(8)
    with torch.no_grad():
        difference = model(TOKENS).last_hidden_state - source(TOKENS).last_hidden_state
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_fine_tuned_classifier(family, settings, tmp_path):
    """No language head: quality is the error of the hidden states; the head comes along."""
    head = "AutoModelForSequenceClassification"
    folder = tiny_checkpoint(tmp_path / "dense", family, head=head)
    report = emoe.convert(str(folder), output=tmp_path / "out", **(settings | {"sequence_length": 1024}))
    assert report["quality"]["measure"] == "hidden-state error"
    errors = [row["value"] for row in report["quality"]["rows"]]
    assert min(errors) > 1e-4
    assert max(layer["all_experts_error"] for layer in report["layers"]) < 1e-5
    source = getattr(transformers, head).from_pretrained(folder).eval()
    model = getattr(transformers, head).from_pretrained(tmp_path / "out").eval()
    model.set_top_k(8)
    with torch.no_grad():
        assert (model(TOKENS[:1]).logits - source(TOKENS[:1]).logits).abs().max() <= 1e-4


def test_a_bf16_checkpoint_stays_bf16(settings, tmp_path):
    """Weights keep their type on disk, gate tables are fp32, and a bf16 model still routes in fp32."""
    folder = tiny_checkpoint(tmp_path / "dense", "llama")
    rewrite(folder, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = emoe.convert(str(folder), output=tmp_path / "out", **settings)
    assert report["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.router.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS).logits).all()
    assert emoe.export(tmp_path / "out", tmp_path / "back", verify_tokens=256)["identical"] == 4


def test_tied_embeddings(settings, tmp_path):
    folder = tiny_checkpoint(tmp_path / "dense", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    report = emoe.convert(str(folder), output=tmp_path / "out", **settings)
    assert max(layer["all_experts_error"] for layer in report["layers"]) < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
