"""Surgery takes out what it says and nothing else, adds what it says and changes nothing by it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.gates import starve
from support.tiny import tiny_checkpoint

import emoe
from emoe.checkpoint.digests import check_digests
from emoe.cli.main import main
from emoe.config import PruneConfig
from emoe.errors import UserError
from emoe.surgery import rewrite
from emoe.surgery.modules import ModuleSet
from emoe.surgery.prune import _selected

FAMILIES = ("llama", "gpt2", "phi3", "opt", "bert")
"""Gated; transposed and biased; fused; written inline; an encoder."""


def load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForMaskedLM if "bert" in config.model_type else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def logits(folder, top_k: int | None = None) -> torch.Tensor:
    model = load(folder)
    if top_k:
        model.set_top_k(top_k)
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def facts(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config["emoe_provenance"].pop("history", None)
    return config


def prune(source, output, *flags) -> None:
    assert main(["prune", "--model", str(source), "--output", str(output), "--quiet", *map(str, flags)]) == 0


def extend(source, output, *flags) -> None:
    assert main(["extend", "--model", str(source), "--output", str(output), "--quiet", *map(str, flags)]) == 0


def same_checkpoint(one, other) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert facts(one) == facts(other)


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    dense = tiny_checkpoint(folder / "dense", request.param)
    emoe.convert(str(dense), output=folder / "moe", **settings)
    return folder / "moe"


@pytest.fixture
def text(text_file):
    return ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)


@pytest.mark.parametrize("routing", ["top-k", "threshold"])
def test_pruning_what_is_never_used_changes_no_logit(routing, tiny_llama, settings, text, tmp_path):
    emoe.convert(str(tiny_llama), output=tmp_path / "moe", **settings, routing=routing)
    starve(tmp_path / "moe", [1, 6], [0, 2])
    prune(tmp_path / "moe", tmp_path / "small", *text, "--threshold", 1e-9, "--count", "hard")
    groups = json.loads((tmp_path / "small" / "config.json").read_text())["emoe_groups"]
    assert [group[0] <= 6 for group in groups] == [True, False, True, False]
    torch.testing.assert_close(logits(tmp_path / "small"), logits(tmp_path / "moe"), rtol=0, atol=1e-6)


def test_keeping_all_is_the_identity(converted, text, tmp_path):
    prune(converted, tmp_path / "same", *text, "--keep", 1.0)
    same_checkpoint(converted, tmp_path / "same")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(converted), rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [3, 8])
def test_extending_changes_no_logit(converted, top_k, tmp_path):
    extend(converted, tmp_path / "big", "--experts", 2)
    before, after = logits(converted, top_k), logits(tmp_path / "big", top_k)
    # All on, the extended model runs the sparse path beside the stock one: another order of summation
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 if top_k == 8 else 1e-5)


def test_taking_back_what_was_added_restores_the_model(converted, tmp_path):
    extend(converted, tmp_path / "one", "--experts", 2)
    extend(tmp_path / "one", tmp_path / "two", "--experts", 3)
    assert facts(tmp_path / "two")["emoe_groups"] == [[8, 2, 3]] * 4
    prune(tmp_path / "two", tmp_path / "back one", "--remove", "last")
    same_checkpoint(tmp_path / "one", tmp_path / "back one")
    prune(tmp_path / "two", tmp_path / "back", "--remove", "added")
    same_checkpoint(converted, tmp_path / "back")
    history = json.loads((tmp_path / "back" / "config.json").read_text())["emoe_provenance"]["history"]
    assert [step["verb"] for step in history] == ["extend", "extend", "prune"]
    assert len({step["from_digest"] for step in history}) == 3
    assert history[-1]["settings"] == {"remove": "added"}  # nothing was counted


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_pruned_model_is_a_smaller_one(converted, scope, text, tmp_path, capsys):
    prune(converted, tmp_path / "small", *text, "--keep", 0.5, "--scope", scope, "--count", "energy")
    small, whole = load(tmp_path / "small"), load(converted)
    groups = facts(tmp_path / "small")["emoe_groups"]
    assert sum(map(sum, groups)) == 16
    if scope == "layer":
        assert groups == [[4]] * 4
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    report = json.loads((tmp_path / "small" / "emoe_prune.json").read_text())
    assert count(whole) - count(small) == report["parameters"]["before"] - report["parameters"]["after"] > 0
    assert report["bytes"]["after"] < report["bytes"]["before"]
    on_disk = sum(p.stat().st_size for p in (tmp_path / "small").glob("model*.safetensors"))
    assert on_disk == report["bytes"]["after"]


def test_a_pruned_model_is_the_model_without_those_experts(converted, text, tmp_path):
    """The gate of the whole model, told not to choose what was pruned, gives the same logits."""
    prune(converted, tmp_path / "small", *text, "--keep", 0.6, "--count", "energy")
    kept = json.loads((tmp_path / "small" / "emoe_prune.json").read_text())["kept"]
    model = load(converted)
    for layer, ffn in model.sparse_ffns().items():
        gone = [e for e in range(8) if e not in kept[f"{layer}.ffn"]]

        def without(router, arguments, routing, gone=gone):
            logits_NE = routing.logits_NE.index_fill(1, torch.tensor(gone, dtype=torch.int64), -torch.inf)
            experts_NK = router.choose(logits_NE)
            return routing._replace(
                experts_NK=torch.where(logits_NE.gather(1, experts_NK.clamp_min(0)).isinf(), -1, experts_NK)
            )

        ffn.router.register_forward_hook(without)
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(logits(tmp_path / "small"), expected, rtol=0, atol=1e-5)


def test_room_is_asked_for_what_is_written(converted_llama, run, monkeypatch):
    asked = []
    monkeypatch.setattr(rewrite, "require_space", lambda folder, needed, flag: asked.append(needed))
    big = run("extend", converted_llama, "big", "--experts", 8)
    small = run("prune", big, "small", "--remove", "added")
    top = run("prune", big, "top", "--method", "layers-top", "--keep", 0.5)
    folders = (converted_llama, big, small, top)
    before, *after = (sum(p.stat().st_size for p in f.glob("model*.safetensors")) for f in folders)
    assert asked == pytest.approx([after[0], *after], rel=0.02)  # of `extend` also before its texts are read
    assert after[0] > 1.3 * before


def test_random_modules_are_a_uniform_draw():
    """Four of all 32: that each layer keeps one of its eight happens in 8^4 of C(32, 4) draws, 11%."""
    sets = [ModuleSet(layer, "ffn", (8,), (), 6) for layer in range(4)]
    anatomy = SimpleNamespace(sets=lambda: sets)
    one_each = 0
    for seed in range(300):
        config = PruneConfig(keep=0.125, method="random", floor=0, seed=seed)
        try:
            kept, _ = _selected(anatomy, config, None)
            one_each += all(len(modules) == 1 for modules in kept.values())
        except UserError:  # a layer is left without any
            continue
    assert 0.05 < one_each / 300 < 0.18


def test_every_step_records_its_files(converted_llama, run):
    """The next verb, which compares them, takes no other file for its own."""
    big = run("extend", converted_llama, "big", "--experts", 1)
    for folder in (big, run("prune", big, "again", "--remove", "last")):
        assert len(check_digests(folder)) == len(list(folder.glob("*.safetensors")))
    weights = next(big.glob("model*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is not what was written"):
        check_digests(big)
