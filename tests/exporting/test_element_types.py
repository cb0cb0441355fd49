"""Exports in another element type than the model's: what rounding costs is measured, said and judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.routing import FIXED, KEY
from support.tiny import tiny_checkpoint

import emoe
from emoe.cli.main import main
from emoe.errors import UserError
from emoe.exporting import dense


@pytest.fixture(scope="module")
def half(settings, tmp_path_factory) -> Path:
    """A converted model whose checkpoint is in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    own = tiny_checkpoint(folder / "dense", "llama")
    transformers.AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16).save_pretrained(own)
    emoe.convert(str(own), output=folder / "out", **(settings | KEY))
    return folder / "out"


@pytest.mark.parametrize("to", ["dense", "granitemoe"])
def test_bfloat16_is_read_back_in_bfloat16(to, converted, tmp_path):
    source = converted(**KEY)
    report = emoe.export(source, tmp_path / "out", to, dtype="bfloat16", verify_tokens=256)
    assert report["bytes"] < 0.6 * emoe.export(source, tmp_path / "wide", to, verify_tokens=0)["bytes"]
    assert report["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_measured_against_the_checkpoint(dtype, converted, tmp_path, capsys):
    flags = ["--model", str(converted(**FIXED)), "--output", str(tmp_path / "out"), "--dtype", dtype]
    assert main(["export", *flags, "--verify-tokens", "256"]) == 0
    shown = capsys.readouterr()
    assert f"rounded to {dtype}" in shown.err
    assert "0 of 4 converted layers have exactly the source's weights" in shown.out
    report = json.loads((tmp_path / "out" / "emoe_export.json").read_text())
    (comparison,) = report["comparisons"]
    assert comparison["reference"] == "the converted model in float32 with all experts on"
    assert 1e-6 < comparison["kl"] < 0.02
    assert report["identical"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0 of 4 converted layers have exactly the source's weights.\n" in card
    assert f"rounded to {dtype}" in card
    assert f"Loaded by stock transformers in {dtype} and" in card
    assert f"{comparison['kl']:.3g}" in card


def test_what_float32_can_hold_is_kept(half, tmp_path):
    """The reference is then run in float32, too: in 16 bits its own sums would round."""
    report = emoe.export(half, tmp_path / "out", dtype="float32", verify_tokens=256)
    assert report["identical"] == report["layers"] == 4
    assert "the same in float32" in report["exactness"]
    assert report["comparisons"][0]["reference"] == "the converted model in float32 with all experts on"
    assert report["comparisons"][0]["kl"] < 1e-10
    report = emoe.export(half, tmp_path / "granite", "granitemoe", dtype="float32", verify_tokens=256)
    assert report["comparisons"][1]["kl"] < 1e-10


@pytest.mark.parametrize("to", ["dense", "granitemoe"])
def test_a_model_of_16_bits_stays_as_it_is(to, half, tmp_path):
    report = emoe.export(half, tmp_path / "out", to, verify_tokens=256)
    assert report["dtype"] == "bfloat16"
    assert "bit for bit" in report["exactness"]
    assert report.get("identical", 4) == 4
    assert report["comparisons"][0]["reference"].startswith("the converted model")
    assert "float32" not in report["comparisons"][0]["reference"]


@pytest.mark.parametrize(("to", "given"), [("granitemoe", KEY), ("gpt_oss", FIXED)])
def test_only_float32_is_called_exact(to, given, converted, tmp_path):
    """Routers that round choose other experts; output matrices times three round, too."""
    exact, rounded = (
        emoe.export(converted(**given), tmp_path / str(dtype), to, dtype=dtype, verify_tokens=256)
        for dtype in (None, "bfloat16")
    )
    assert "weights equal to the last bit; output matrices are times 3" in exact["exactness"]
    assert exact["comparisons"][-1]["changed"] == 0
    for claim in ("same experts", "equal", "bit for bit"):
        assert claim not in rounded["exactness"]
    assert "near-ties go to other experts: --dtype float32" in rounded["exactness"]
    assert "other weights rounded to bfloat16" in rounded["exactness"]
    free, imposed = rounded["comparisons"]
    assert free["reference"] == "the converted model in float32"
    assert 0 < imposed["changed"] < 0.1 * imposed["choices"]
    assert 1e-3 < imposed["margin"] < 0.5
    assert imposed["kl"] < 0.01


@pytest.mark.parametrize(("family", "head"), [("bert", "AutoModel"), ("llama", "AutoModelForSequenceClassification")])
def test_without_a_language_head_16_bits_are_judged(family, head, converted, tmp_path, monkeypatch):
    source = converted(family, {"head": head}, **FIXED)
    report = emoe.export(source, tmp_path / "out", dtype="bfloat16", verify_tokens=256)
    assert 1e-3 < report["comparisons"][0]["relative"] < 0.05
    assert f"model = {head}.from_pretrained(" in (tmp_path / "out" / "README.md").read_text()
    own = dense._padded
    monkeypatch.setattr(dense, "_padded", lambda *arguments: 3 * own(*arguments))
    with pytest.raises(UserError, match=r"off by .* of its length, at most .*\. Try --dtype float32$"):
        emoe.export(source, tmp_path / "wrong", dtype="bfloat16", verify_tokens=256)
    assert not (tmp_path / "wrong").exists()


def test_a_head_that_came_later_counts(converted, tmp_path):
    """Fine-tuning may put a classifier where the source had its language head."""
    source, model = converted(**KEY), tmp_path / "model"
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    classifier.save_pretrained(model)
    for name in ("partition.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, model)
    with pytest.raises(UserError, match="no language head; use --to dense"):
        emoe.export(model, tmp_path / "out", "granitemoe", verify_tokens=0)
    report = emoe.export(model, tmp_path / "dense", verify_tokens=256)
    assert report["comparisons"][0]["kl"] is None
    assert "import AutoModelForSequenceClassification\n" in (tmp_path / "dense" / "README.md").read_text()
