"""A pruned model, whose layers differ in their numbers of modules, weighs, generates and trains as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.labelled import write_task

from emoe.cli.main import main
from emoe.surgery.history import digest_of

MODULE = {"emoe_llama": {"ffn": 3 * 32 * 6}, "moduleformer": {"ffn": 2 * 32 * 24 + 32, "attention": 2 * 32 * 16 + 32}}
"""Parameters of a module. A converted model's gate has none, a ModuleFormer's linear one a row of the model's width."""


@pytest.fixture(params=["converted_llama", "tiny_moduleformer"])
def whole(request) -> Path:
    return request.getfixturevalue(request.param)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def groups_of(folder: Path) -> dict[str, list[list[int]]]:
    """The modules of each layer, by the name of the field that says so."""
    return {key: value for key, value in config_of(folder).items() if key.endswith("_groups") and value}


def history_of(folder: Path) -> list[dict]:
    return config_of(folder)["emoe_provenance"]["history"]


@pytest.fixture
def uneven(whole, run, text) -> Path:
    folder = run("prune", whole, "uneven", *text, "--keep", 0.6)
    assert all(len(set(map(tuple, groups))) > 1 for groups in groups_of(folder).values())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def loaded(folder: Path, auto=transformers.AutoModelForCausalLM):
    """The model, of which every tensor lies in the files in its shape."""
    model, told = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(told.values()), told
    return model.eval()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what both have and differs."""
    assert {n: t.shape for n, t in before.items() if n in after} == {
        n: t.shape for n, t in after.items() if n in before
    }
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def is_gate(name: str) -> bool:
    return ".router." in name or ".gate." in name


@pytest.mark.parametrize("verb", ["prune", "extend"])
def test_sizes_change_by_the_modules_that_go_or_come(verb, whole, run, text):
    each = MODULE[config_of(whole)["model_type"]]
    new = ("--experts", 2, *(("--attention", 1) if "attention" in each else ()))
    after = run(verb, whole, "after", *((*text, "--keep", 0.6) if verb == "prune" else new))
    report = json.loads((after / f"emoe_{verb}.json").read_text())
    for when, folder in (("before", whole), ("after", after)):
        assert report["bytes"][when] == sum(p.stat().st_size for p in folder.glob("model*.safetensors"))
        assert report["parameters"][when] == loaded(folder).num_parameters()
    layers = 4 if "converted" in str(whole) else 3
    if verb == "prune":
        before = {"ffn": 8 * layers, "attention": 6 * layers}
        left = {kind: sum(len(k) for name, k in report["kept"].items() if name.endswith(kind)) for kind in each}
        difference = sum((left[kind] - before[kind]) * size for kind, size in each.items())
    else:
        difference = layers * (2 * each["ffn"] + each.get("attention", 0))
    assert report["parameters"]["after"] - report["parameters"]["before"] == difference
    # fp32, and of converted models the gate's tables besides; headers are some hundred bytes at most
    assert (report["bytes"]["after"] - report["bytes"]["before"]) / (4 * difference) == pytest.approx(1.0, abs=0.15)


def test_generation_takes_the_likeliest_token(uneven):
    """With a cache, as without one."""
    model = loaded(uneven)
    said = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=12, do_sample=False, use_cache=True)
    assert said.shape[1] > 4
    with torch.no_grad():
        likeliest = model(said[:, :-1], use_cache=False).logits.argmax(-1)
    assert said[:, 3:].tolist() == likeliest[:, 2:].tolist()


STEPS = ("--steps", 12, "--tokens-per-step", 128, "--sequence-length", 64, "--held-out-tokens", 128)


@pytest.mark.parametrize("train", ["all", "router"])
def test_tuning(train, uneven, run, text_file):
    flags = ("--text", text_file, *STEPS, "--learning-rate", 1e-2, "--precision", "float32")
    tuned = run("tune", uneven, "tuned", *flags, "--train", train)
    assert groups_of(tuned) == groups_of(uneven)
    before, after = weights(uneven), weights(tuned)
    assert before.keys() == after.keys()
    gates = {name for name in before if is_gate(name)}
    moved = changed(before, after)
    assert moved
    assert moved <= gates if train == "router" else {n for n in before if "experts.weight" in n or "proj" in n} <= moved
    found = json.loads((tuned / "emoe_tune.json").read_text())["perplexity"]["training domain"]
    assert train == "router" or found["after"] < 0.9 * found["before"]
    assert [step["verb"] for step in history_of(tuned)] == ["prune", "tune"]
    assert history_of(tuned)[-1]["from_digest"] == digest_of(uneven)
    loaded(tuned)


def test_tuning_what_was_added_to_a_pruned_model(uneven, run, text_file):
    """Taking it out again gives the pruned model bit for bit."""
    big = run("extend", uneven, "big", "--experts", 1)
    flags = ("--text", text_file, *STEPS, "--learning-rate", 1e-2, "--precision", "float32", "--train", "new-modules")
    tuned = run("tune", big, "tuned", *flags)
    assert changed(weights(big), weights(tuned))
    back = run("prune", tuned, "back", "--remove", "last")
    assert weights(back).keys() == weights(uneven).keys()
    assert changed(weights(back), weights(uneven)) == set()
    assert groups_of(back) == groups_of(uneven)


@pytest.mark.parametrize("train", ["all", "router"])
def test_finetuning(train, converted_llama, run, text, tmp_path):
    uneven = run("prune", converted_llama, "uneven", *text, "--keep", 0.6)
    flags = ("--model", uneven, "--task", write_task(tmp_path / "task"), "--output", tmp_path / "run", "--train", train)
    flags += ("--gate", "discriminant", "--max-steps", 4, "--learning-rate", 1e-2, "--precision", "float32", "--quiet")
    assert main(["finetune", *map(str, flags)]) == 0
    folder = tmp_path / "run" / "seed-0" / "model"
    assert groups_of(folder) == groups_of(uneven)
    moved = changed(weights(uneven), weights(folder))
    gates = {name for name in weights(uneven) if is_gate(name)}
    assert moved
    assert moved <= gates if train == "router" else {n for n in weights(uneven) if "mlp" in n} - gates <= moved
    assert [step["verb"] for step in history_of(folder)] == ["prune", "finetune"]
    assert history_of(folder)[-1]["from_digest"] == digest_of(uneven)
    loaded(folder, transformers.AutoModelForSequenceClassification)
