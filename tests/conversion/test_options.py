"""Each way of converting: what it promises, on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.fresh import LOAD, run_fresh
from support.masked import gate_tables, labels_of
from support.tiny import CONFIGS, VOCAB, tiny_checkpoint

import emoe
from emoe.config import resolve_config
from emoe.conversion import engine as engine_module
from emoe.conversion.convert import prepare
from emoe.conversion.engine import CALIBRATION, CONVERT, Engine
from emoe.modeling.ffn_emoe import SparseFFN

TOKENS = torch.randint(5, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))


def converted(folder, settings, output, changes=None, **more):
    """(report, model) of a conversion."""
    report = emoe.convert(str(folder), output=output, **(settings | (changes or {}) | more))
    return report, transformers.AutoModelForCausalLM.from_pretrained(output).eval()


OPTIONS = [
    {"routing": "top-k"},
    {"routing": "energy-share"},
    {"allocation": "uniform"},
    {"shared_experts": 1},
    {"compensate": True},
    {"refit_outputs": True},
    {"prefix": "dense"},
    {"refine_rounds": 0},
    {"features": "graded"},
    {"features": "tf-idf"},
    {"features": "residual"},
    {"split": "graph"},
    {"gate": "average-key", "routing": "threshold", "allocation": "sensitivity"},
    {"gate": "representative", "compensate": True},
]


@pytest.fixture(scope="module")
def with_each_option(tiny_llama, settings, tmp_path_factory) -> list[tuple]:
    """(report, model, logits in a process without our packages) of every option, by one such process."""
    folders = [tmp_path_factory.mktemp("options") / "out" for _ in OPTIONS]
    made = [converted(tiny_llama, settings, *case) for case in zip(folders, OPTIONS, strict=True)]
    outputs = [folder.with_name("logits.safetensors") for folder in folders]
    run_fresh(LOAD, "without", *(path for pair in zip(folders, outputs, strict=True) for path in pair))
    return [(*one, load_file(output)["logits"]) for one, output in zip(made, outputs, strict=True)]


@pytest.mark.parametrize(
    "number", range(len(OPTIONS)), ids=[" ".join(f"{k}={v}" for k, v in changes.items()) for changes in OPTIONS]
)
def test_every_option_makes_a_checkpoint_that_loads_anywhere(number, with_each_option, settings):
    """The same logits with our packages and without them, and the budget is kept on average."""
    report, model, found = with_each_option[number]
    chosen = next(row for row in report["quality"]["rows"] if row["top_k"] == settings["top_k"])
    assert chosen["active"] == pytest.approx(settings["top_k"] / 8, abs=0.07)
    with torch.no_grad():
        torch.testing.assert_close(found, model(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_calibration_text_behind_a_layer_is_what_the_converted_layer_gives(
    family, refit, settings, tmp_path, monkeypatch
):
    """Whether by a second pass or by taking away what skipped neurons add: the next layer sees the converted prefix."""
    folder = tiny_checkpoint(tmp_path / family, family)
    changes = {"model": str(folder), "held_out_tokens": 0, "calibrate_in": "float32"}
    changes |= {"compensate": True, "refit_outputs": refit}
    config, _ = resolve_config({**settings, **changes})
    engine = Engine(prepare(config), tmp_path, lambda *_: None)
    expected = {}

    class Watching(engine_module.RouterFit):
        def run(self, layer, index, states):
            before = states.copy(self.stream)
            super().run(layer, index, states)
            expected[index] = (layer, before)

    monkeypatch.setattr(engine_module, "RouterFit", Watching)
    engine.open()
    engine.run(layer_done=lambda: check(engine, expected))
    assert len(expected) == 4


def check(engine, expected) -> None:
    """After a layer of the second pass."""
    index = engine.next_layer - 1
    if engine.phase != CONVERT or index not in expected:
        return
    layer, states = expected[index]
    assert next(m for m in layer.modules() if isinstance(m, SparseFFN)).router.top_k == engine.plan.top_k
    engine.stream.run_all(layer, index, states)
    torch.testing.assert_close(engine.streams[CALIBRATION].data, states.data, rtol=1e-4, atol=1e-4)


def test_later_gates_know_the_converted_prefix(tiny_llama, settings, tmp_path):
    """Layer 0 sees the same inputs either way; from layer 1 on the gates differ."""
    tables = {}
    for prefix in ("dense", "converted"):
        emoe.convert(str(tiny_llama), output=tmp_path / prefix, **(settings | {"prefix": prefix}))
        tables[prefix] = gate_tables(tmp_path / prefix)
    name = "model.layers.{}.mlp.router.weight"
    torch.testing.assert_close(*(tables[p][name.format(0)] for p in tables), rtol=1e-3, atol=1e-4)
    assert (tables["dense"][name.format(1)] - tables["converted"][name.format(1)]).abs().max() > 1e-3


def test_shared_experts_are_always_chosen_and_hold_the_busiest_neurons(tiny_llama, settings, tmp_path):
    _, model = converted(tiny_llama, settings, tmp_path / "out", shared_experts=1)
    assert model.config.emoe_shared_experts == 1
    chosen = []
    for ffn in model.sparse_ffns().values():
        ffn.router.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts_NK))
    with torch.no_grad():
        model(TOKENS)
    assert all((experts_NK == 0).any(1).all() for experts_NK in chosen)
    assert all((labels_F == 0).sum() == 6 for labels_F in labels_of(tmp_path / "out").values())


def test_compensation_is_the_mean_of_what_is_skipped(tiny_llama, settings, tmp_path):
    """On the calibration text the FFN's mean output equals the dense FFN's; with all experts on nothing is added."""
    _, model = converted(tiny_llama, settings, tmp_path / "out", compensate=True, calibrate_in="float32")
    ffn = model.model.layers[0].mlp
    assert ffn.router.compensation.shape == (32,)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    config, _ = resolve_config({"model": str(tiny_llama), **settings})
    engine = Engine(prepare(config), tmp_path, lambda *_: None)
    engine.open()
    inputs = []
    handle = dense.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        dense(engine.blocks.calibration)
        handle.remove()
        sparse, full = ffn(inputs[0]).mean((0, 1)), dense.model.layers[0].mlp(inputs[0]).mean((0, 1))
        torch.testing.assert_close(sparse, full, rtol=1e-3, atol=1e-4)
        model.set_top_k(8)
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=0, atol=1e-4)


def test_refitted_outputs_come_nearer_to_the_dense_model(tiny_llama, settings, tmp_path):
    plain, _ = converted(tiny_llama, settings, tmp_path / "plain")
    refitted, _ = converted(tiny_llama, settings, tmp_path / "refitted", refit_outputs=True)
    value = lambda report, k: next(r for r in report["quality"]["rows"] if r["top_k"] == k)  # noqa: E731
    assert value(refitted, 3)["agreement"] > value(plain, 3)["agreement"]
    assert value(refitted, 8)["ratio"] != 1  # the dense model is no longer inside, and the report says so
    config = json.loads((tmp_path / "refitted" / "config.json").read_text())
    assert config["emoe_provenance"]["outputs"] == "refitted by least squares"
    back = emoe.export(tmp_path / "refitted", tmp_path / "back", verify_tokens=256)
    assert (back["layers"], back["identical"]) == (4, 0)


def test_budget_is_active_by_sensitivity(tiny_llama, settings, tmp_path):
    fixed = {k: v for k, v in settings.items() if k != "top_k"}
    report, model = converted(tiny_llama, fixed, tmp_path / "out", budget=0.5)
    assert report["num_experts_per_tok"] == 4
    assert model.config.emoe_allocation == "sensitivity"
    shares = [layer["share"] for layer in report["layers"]]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)
    assert max(shares) > min(shares)


def test_another_domain_is_measured_too(tiny_llama, settings, tmp_path):
    report, _ = converted(tiny_llama, settings, tmp_path / "out", held_out=["builtin-code"])
    other = report["quality"]["domains"]["builtin-code"]
    assert other["tokens"] == report["quality"]["tokens"]
    assert other["dense"] != report["quality"]["dense"]
    assert [row["top_k"] for row in other["rows"]] == [row["top_k"] for row in report["quality"]["rows"]]
