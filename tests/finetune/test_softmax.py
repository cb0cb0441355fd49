"""Softmax gates: recovery begins from the model's own gate, trains it, and stock formats hold the result."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from support.routers import D, sparse_mlp
from support.routing import FIXED, KEY

import emoe
from emoe.cli.main import main
from emoe.finetuning import softmax
from emoe.surgery.converted import Converted

TRAINING = ("--tokens-per-step", "256", "--sequence-length", "64", "--held-out-tokens", "256", "--precision", "float32")


@pytest.fixture(scope="module")
def recovered(tiny_llama, settings, text_file, tmp_path_factory):
    """``recovered(gate, …settings of the conversion)`` → the report and the folder of a recovery with softmax gates."""

    def make(**given):
        folder = tmp_path_factory.mktemp("softmax")
        emoe.convert(str(tiny_llama), output=folder / "converted", **settings | FIXED | given)
        report = emoe.recover(
            folder / "converted",
            folder / "out",
            gates="softmax",
            text=[str(text_file)],
            steps=20,
            learning_rate=3e-3,
            tokens_per_step=256,
            sequence_length=64,
            held_out_tokens=256,
            precision="float32",
        )
        return report, folder / "out"

    return make


@pytest.fixture(scope="module")
def model(recovered):
    """One of the default gate."""
    return recovered()


def test_weights_are_the_softmax_over_the_chosen_times_k():
    ffn, x_ND = sparse_mlp("softmax", experts=6, top_k=3), torch.randn(20, D)
    found = ffn.router(x_ND, ffn)
    logits_NE = x_ND @ ffn.router.weight.T
    torch.testing.assert_close(found.logits_NE, logits_NE)
    best = logits_NE.topk(3)
    weights_NE = torch.zeros_like(logits_NE).scatter(1, best.indices, 3 * best.values.softmax(-1))
    torch.testing.assert_close(torch.zeros_like(logits_NE).scatter(1, found.experts_NK, found.weights_NK), weights_NE)


def test_experts_that_differ_in_number_are_1_on_average():
    """The rule "threshold" leaves places of a row empty: they count for nothing."""
    ffn, x_ND = sparse_mlp("softmax", experts=6, top_k=3, routing="threshold"), torch.randn(200, D)
    ffn.router.bounds[2] = torch.tensor([1, 5])
    found = ffn.router(x_ND, ffn)
    used_NK = found.experts_NK >= 0
    assert len(set(used_NK.sum(1).tolist())) > 2
    assert (found.weights_NK[~used_NK] == 0).all()
    torch.testing.assert_close(found.weights_NK.sum(1), used_NK.sum(1).float())


def test_gradients_reach_what_comes_into_a_gate_that_does_not_learn():
    """The weights depend on the token, whatever is trained."""
    ffn = sparse_mlp("softmax", experts=6, top_k=3).double()
    x_ND = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    (gradient_ND,) = torch.autograd.grad(ffn.router(x_ND, ffn).weights_NK.square().sum(), x_ND)
    assert gradient_ND.abs().min() > 0


def test_a_constant_is_told_from_tokens_with_a_mean():
    x_ND = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)
    assert ((x_ND @ softmax.constant(x_ND)) - 1).abs().mean() < 0.15


@torch.no_grad()
@pytest.mark.parametrize("gate", ["average-key", "discriminant"])
def test_it_begins_near_the_gate_that_was_there(gate, tiny_llama, settings, tmp_path):
    """The same experts, but for biases, with weights within a tenth of 1."""
    emoe.convert(str(tiny_llama), output=tmp_path / "model", **settings | FIXED | {"gate": gate})
    tokens_BT = torch.randint(5, 90, (8, 64), generator=torch.Generator().manual_seed(1))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    routers = [ffn.router for ffn in model.sparse_ffns().values()]
    seen = {router: [] for router in routers}
    hooks = [router.register_forward_hook(lambda r, given, found: seen[r].append((given, found))) for router in routers]
    model(tokens_BT)
    for hook in hooks:
        hook.remove()
    softmax.install(model, tokens_BT)
    assert model.config.emoe_gate == "softmax"
    for router in routers:
        ((x_ND, ffn), before) = seen[router][0]
        found = router(x_ND, ffn)
        chosen_NE, own_NE = (torch.zeros_like(before.logits_NE).scatter(1, r.experts_NK, 1) for r in (found, before))
        least = 0.999 if gate == "average-key" else 0.8
        assert (chosen_NE * own_NE).sum() / own_NE.sum() > least
        assert (found.weights_NK - 1).abs().max() < 0.1
        assert found.logits_NE.std(1).mean() == pytest.approx(softmax.SPREAD, rel=0.2)


def test_recovery_trains_them(model, capsys):
    report, folder = model
    assert main(["inspect", str(folder), "--brief"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "softmax (trained after the conversion)" in shown
    assert "gates softmax" in shown
    assert json.loads((folder / "config.json").read_text())["emoe_gate"] == "softmax"
    row = next(row for row in report["rows"] if row["top_k"] == 3)
    assert row["after"]["training domain"] < 0.9 * row["before"]["training domain"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = [ffn.router.weight for ffn in loaded.sparse_ffns().values()]
    assert all(weight.dtype == torch.float32 and not isinstance(weight, torch.nn.Parameter) for weight in weights)
    assert not any(name.endswith("router.bias") for name in loaded.state_dict())


@pytest.mark.parametrize("to", ["mixtral", "granitemoe", "qwen2_moe", "gpt_oss"])
def test_stock_formats_hold_them_without_loss(to, model, tmp_path):
    _, folder = model
    report = emoe.export(folder, tmp_path / "out", to, verify_tokens=512)
    free, imposed = report["comparisons"]
    assert max(free["kl"], imposed["kl"]) < 1e-10
    assert imposed["changed"] == 0
    assert "weighed by the same softmax" in report["exactness"]


def test_exports_tell_what_was_trained(model, tmp_path, capsys):
    for to in ("mixtral", "dense"):
        report = emoe.export(model[1], tmp_path / to, to, verify_tokens=0)
        assert "| changed since | recover; " in (tmp_path / to / "README.md").read_text()
    own = "the checkpoint's own (changed since the conversion: recover) weights"
    assert report["exactness"].startswith(f"{own} bit for bit; ")
    before = emoe.export(model[1].parent / "converted", tmp_path / "before", verify_tokens=0)
    assert before["exactness"].startswith("the source's weights bit for bit; ")


def test_some_layers_only(recovered, tmp_path):
    _, folder = recovered(gate="average-key", layers="1,3")
    imposed = emoe.export(folder, tmp_path / "out", "qwen2_moe", verify_tokens=256)["comparisons"][-1]
    assert imposed["kl"] < 1e-10


def test_a_wrong_router_is_thrown_away(model, tmp_path, monkeypatch, capsys):
    """The limits are those of an exact format, though Mixtral's own are wider."""
    from emoe.exporting import stock

    wrong = lambda router_ED, source, index: router_ED * 1.05  # noqa: E731
    monkeypatch.setattr(stock, "softmax_first", wrong)
    flags = ["--to", "mixtral", "--output", str(tmp_path / "out"), "--verify-tokens", "256", "--quiet"]
    assert main(["export", "--model", str(model[1]), *flags]) == 2
    assert "computes something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_experts_on_is_no_stock_mixture(model, tmp_path, capsys):
    flags = ["--to", "mixtral", "--fix-k", "8", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["export", "--model", str(model[1]), *flags]) == 2
    assert "--fix-k with fewer" in capsys.readouterr().err


def test_an_expert_that_is_knocked_out_leaves_the_weights_of_the_others(model):
    """Weights are those of the choice without it, not those of the experts whose places others have taken."""
    _, folder = model
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    anatomy = Converted(folder, json.loads((folder / "config.json").read_text()))
    router, tokens_BT = loaded.sparse_ffns()[1].router, torch.randint(5, 90, (4, 32))
    router.weight *= 50
    seen = []
    with torch.no_grad(), anatomy.without(loaded, "1.ffn", 2):
        hook = router.register_forward_hook(lambda _, given, found: seen.append(found))
        loaded(tokens_BT)
        hook.remove()
    ((experts_NK, logits_NE, weights_NK),) = seen
    logits_NE[:, 2] = -torch.inf
    best = logits_NE.topk(3)
    expected_NE = torch.zeros_like(logits_NE).scatter(1, best.indices, 3 * best.values.softmax(-1))
    torch.testing.assert_close(torch.zeros_like(logits_NE).scatter(1, experts_NK, weights_NK), expected_NE)


def test_a_layer_with_one_expert_left(tiny_llama, settings, text_file, tmp_path):
    emoe.convert(str(tiny_llama), output=tmp_path / "model", **settings | FIXED)
    keep = ["--keep", "0.3", "--scope", "model", "--floor", "1"]
    sample = ["--tokens", "512", "--sequence-length", "64", "--quiet"]
    pruned, files = str(tmp_path / "pruned"), ["--text", str(text_file)]
    assert main(["prune", "--model", str(tmp_path / "model"), "--output", pruned, *files, *keep, *sample]) == 0
    assert [1] in json.loads((tmp_path / "pruned" / "config.json").read_text())["emoe_groups"]
    flags = ["--model", pruned, "--output", str(tmp_path / "out"), "--teacher", str(tiny_llama), *files, *TRAINING]
    assert main(["recover", *flags, "--gates", "softmax", "--steps", "2", "--quiet"]) == 0


def test_pruned_they_choose_among_those_left(model, tmp_path, text_file):
    flags = ["--text", str(text_file), "--keep", "0.5", "--tokens", "512", "--sequence-length", "64", "--quiet"]
    assert main(["prune", "--model", str(model[1]), "--output", str(tmp_path / "out"), *flags]) == 0
    pruned, whole = (transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "out", model[1]))
    rows_ED = whole.sparse_ffns()[0].router.weight
    ffn, x_ND = pruned.sparse_ffns()[0], torch.randn(20, rows_ED.shape[1])
    assert all((row_D == rows_ED).all(1).any() for row_D in ffn.router.weight)
    found = ffn.router(x_ND, ffn)
    assert len(ffn.router.weight) < len(rows_ED)
    torch.testing.assert_close(found.weights_NK, found.logits_NE.gather(1, found.experts_NK).softmax(1) * 3)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (KEY | {"gate": "representative"}, "is not linear; convert it again with --gate discriminant"),
        (KEY | {"routing": "threshold"}, "--routing top-k --allocation uniform"),
        (KEY | {"shared_experts": 1}, "--shared-experts 0"),
        (KEY | {"top_k": 1}, "nothing would be learned; give --budgets in between"),
        (KEY | {"top_k": 8}, "nothing would be learned; give --budgets in between"),
    ],
)
def test_models_that_have_none_to_begin_with(given, complaint, tiny_llama, settings, tmp_path, text_file, capsys):
    emoe.convert(str(tiny_llama), output=tmp_path / "model", **settings | given)
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--text", str(text_file)]
    assert main(["recover", *flags, *TRAINING, "--gates", "softmax", "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emoe: --gates: softmax: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_they_are_learned_further(model, tmp_path, text_file, capsys):
    files = ["--model", str(model[1]), "--output", str(tmp_path / "out"), "--text", str(text_file)]
    flags = ["recover", *files, *TRAINING]
    teacher = ["--teacher", str(model[1].parent / "converted")]
    assert main([*flags, *teacher, "--gates", "softmax", "--steps", "1"]) == 2
    assert "has one already; use learned" in capsys.readouterr().err
    assert main([*flags, *teacher, "--gates", "learned", "--steps", "2", "--quiet"]) == 0
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(f).model.layers[0].mlp.router.weight
        for f in (model[1], tmp_path / "out")
    )
    assert not torch.equal(before, after)
