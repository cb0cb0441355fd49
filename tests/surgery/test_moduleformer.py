"""The laws of surgery on a ModuleFormer, whose attention heads and FFNs are both modules."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.gates import gates_of
from support.modules import moduleformer
from support.tiny import tiny_tokenizer

import emoe
from emoe.errors import UserError
from emoe.surgery.rewrite import rewrite

GATE_ROWS = {"mlp": "gate.w_gate.3.weight", "linear": "gate.w_gate.0.weight", "gmm": "gate.expert_centroids"}
"""Kind of gate → its tensor with a row an expert."""


@pytest.fixture(scope="module", params=["mlp", "linear", "gmm"])
def model_folder(request, tmp_path_factory):
    return moduleformer(tmp_path_factory.mktemp(request.param) / "model", request.param)


def load(folder):
    return emoe.ModuleFormerForCausalLM.from_pretrained(folder).eval()


def logits(folder) -> torch.Tensor:
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load(folder)(tokens).logits


def config_of(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config.pop("emoe_provenance", None)
    return {key: value for key, value in config.items() if value is not None}


def same_checkpoint(one, other) -> None:
    first, second = load(one).state_dict(), load(other).state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert config_of(one) == config_of(other)


def test_extending_and_taking_back(model_folder, run, tmp_path):
    run("extend", model_folder, "one", "--experts", 2, "--attention", 1)
    run("extend", tmp_path / "one", "two", "--experts", 3)
    for name in ("one", "two"):
        torch.testing.assert_close(logits(tmp_path / name), logits(model_folder), rtol=0, atol=1e-5)
    run("prune", tmp_path / "two", "back one", "--remove", "last")
    same_checkpoint(tmp_path / "one", tmp_path / "back one")
    run("prune", tmp_path / "two", "back", "--remove", "added")
    same_checkpoint(model_folder, tmp_path / "back")


def test_new_experts_take_part(model_folder, run, tmp_path):
    """Their gates let some tokens through and not others, so that they can be trained and tell tokens apart."""
    run("extend", model_folder, "big", "--experts", 2, "--attention", 2)
    model = load(tmp_path / "big")
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    out = model(tokens, output_router_logits=True, labels=tokens)
    used = torch.cat([(routing.experts_NK[:, -2:] >= 0).float() for routing in out.routing])
    assert 0.1 < used.mean() < 0.9
    out.loss.backward()
    for block in model.transformer.h:
        assert block.mlpf.output_experts.weight.grad[8:].abs().sum() > 0
        assert block.attn.q_proj.output_experts.weight.grad[6:].abs().sum() > 0


def test_keeping_all_is_the_identity(model_folder, run, text_file, tmp_path):
    run("prune", model_folder, "same", "--text", text_file, "--keep", 1.0)
    same_checkpoint(model_folder, tmp_path / "same")


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_pruned_model_is_a_smaller_one(model_folder, run, scope, text_file, tmp_path):
    text = ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)
    run("prune", model_folder, "small", *text, "--keep", 0.5, "--scope", scope)
    small, whole = load(tmp_path / "small"), load(model_folder)
    kept = json.loads((tmp_path / "small" / "emoe_prune.json").read_text())["kept"]
    assert [sum(len(k) for n, k in kept.items() if n.endswith(kind)) for kind in ("attention", "ffn")] == [9, 12]
    expected, gate_rows = whole.state_dict(), GATE_ROWS[config_of(model_folder)["gate_type"]]
    for layer in range(3):
        for kind, module in (("attention", "attn.q_proj"), ("ffn", "mlpf")):
            start = f"transformer.h.{layer}.{module}."
            rows = [f"{start}{name}" for name in ("experts.weight", "output_experts.weight", gate_rows)]
            expected |= {name: expected[name][kept[f"{layer}.{kind}"]] for name in rows}
    found = small.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_pruned_model_is_the_model_without_those_experts(model_folder, run, text_file, tmp_path):
    """The whole model, whose gates are told to give nothing to what was pruned: their softmax is over what is left."""
    text = ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)
    run("prune", model_folder, "small", *text, "--keep", 0.6)
    kept = json.loads((tmp_path / "small" / "emoe_prune.json").read_text())["kept"]
    model = load(model_folder)
    for name, gate in gates_of(model).items():
        gone = torch.tensor([e for e in range(gate.num_experts) if e not in kept[name]], dtype=torch.int64)
        gate.logits = lambda x, old=gate.logits, gone=gone: old(x).index_fill(1, gone, -torch.inf)
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "small"), model(tokens).logits, rtol=0, atol=1e-5)


def test_pruning_what_is_never_used_changes_no_logit(model_folder, run, text_file, tmp_path):
    """Experts whose probability is 0: others are weighted by the softmax over all."""
    if config_of(model_folder)["gate_type"] != "linear":
        pytest.skip("only a linear gate is told by its rows to give nothing to any token")
    model = load(model_folder)
    with torch.no_grad():
        for block in model.transformer.h:
            rows_ED = block.mlpf.gate.w_gate[0].weight
            rows_ED -= rows_ED.mean(1, keepdim=True)  # blind to the constant that the starved rows see
            block.ln_2.bias[:], block.ln_2.weight[:] = 1.0, 0.05
            rows_ED[[1, 4]] = -10.0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    text = ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)
    run("prune", tmp_path / "model", "small", *text, "--threshold", 1e-9, "--count", "hard")
    kept = json.loads((tmp_path / "small" / "emoe_prune.json").read_text())["kept"]
    assert [kept[f"{layer}.ffn"] for layer in range(3)] == [[0, 2, 3, 5, 6, 7]] * 3
    assert [len(kept[f"{layer}.attention"]) for layer in range(3)] == [6] * 3
    torch.testing.assert_close(logits(tmp_path / "small"), logits(tmp_path / "model"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "sampled"), [(("--top-k", 1), 1), (("--top-k", 2), 2), (("--method", "layers-top"), 2)]
)
def test_no_more_experts_are_drawn_than_are_used(flags, sampled, tiny_moduleformer, run, text, tmp_path):
    drawn = shutil.copytree(tiny_moduleformer, tmp_path / "drawn")
    config = json.loads((drawn / "config.json").read_text())
    (drawn / "config.json").write_text(json.dumps(config | {"sample_topk": 2}))
    counted = () if "layers-top" in flags else text
    small = run("prune", drawn, "small", *counted, "--keep", 0.5, *flags)
    assert load(small).config.sample_topk == sampled
    notes = json.loads((small / "emoe_prune.json").read_text())["notes"]
    assert any("sample_topk clipped from 2 to 1" in note for note in notes) == (sampled == 1)


def test_a_config_that_would_not_load_is_not_written(tiny_moduleformer, tmp_path):
    config = json.loads((tiny_moduleformer / "config.json").read_text()) | {"k_att": 99}
    edit = lambda name, tensor: (name, tensor)  # noqa: E731
    settings = {"overwrite": False, "progress": lambda *_: None}
    with pytest.raises(UserError, match=r"would not load \(k_att=99 must lie between"):
        rewrite(tiny_moduleformer, str(tmp_path / "x"), edit, config, lambda _: None, {"verb": "prune"}, **settings)
    assert list(tmp_path.iterdir()) == []
