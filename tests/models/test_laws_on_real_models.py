"""The laws on real models from packages: SmolLM2-135M (Llama) and all-MiniLM-L6-v2 (BERT)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import emoe
from emoe.assets import resolve_model

pytestmark = pytest.mark.model

TEXT = (
    "The harbour was quiet in the early morning. Two fishing boats came back with the tide, and the men on the quay "
    "counted boxes of mackerel while the gulls waited on the roof of the old customs house."
)
FAST = {"calibration_tokens": 4096, "held_out_tokens": 0, "sequence_length": 256}


@pytest.fixture(scope="module")
def smollm() -> str:
    return str(resolve_model("smollm2-135m").folder)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> tuple[str, str, dict]:
    """all-MiniLM-L6-v2, its conversion with the default split and gate, and the report on that."""
    folder, output = str(resolve_model("all-minilm-l6-v2").folder), tmp_path_factory.mktemp("minilm") / "out"
    return folder, str(output), emoe.convert(folder, output=output, **(FAST | {"held_out_tokens": 1024}))


def logits(folder: str, auto=AutoModelForCausalLM, top_k: int | None = None) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    model = auto.from_pretrained(folder).eval()
    if top_k:
        model.set_top_k(top_k)
    with torch.no_grad():
        out = model(**tokens)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def test_smollm_with_all_experts_is_the_dense_model(smollm, tmp_path):
    """Every layer converted; all experts on within 1e-4, half of them not; the export is bit for bit the source."""
    from_weights = {"split": "weights", "gate": "average-key", "routing": "top-k", "allocation": "uniform"}
    emoe.convert(smollm, output=tmp_path / "out", held_out_tokens=0, **from_weights)
    dense = logits(smollm)
    assert (logits(str(tmp_path / "out"), top_k=64) - dense).abs().max() <= 1e-4
    assert (logits(str(tmp_path / "out"), top_k=32) - dense).abs().max() > 0.1
    report = emoe.export(tmp_path / "out", tmp_path / "back", verify_tokens=256)
    assert report["identical"] == report["layers"] == 30
    assert report["comparisons"][0]["kl"] < 1e-8
    assert torch.equal(logits(str(tmp_path / "back")), dense)


def test_minilm_with_all_experts_is_the_dense_model(minilm):
    """An encoder without a language head: its last hidden states, and the report by hidden-state error."""
    folder, output, report = minilm
    dense = logits(folder, AutoModel)
    assert (logits(output, AutoModel, top_k=64) - dense).abs().max() <= 1e-4
    quality = report["quality"]
    assert quality["measure"] == "hidden-state error"
    errors = [row["value"] for row in quality["rows"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-5
    assert max(layer["all_experts_error"] for layer in report["layers"]) < 1e-5


def test_two_late_layers_stay_within_a_tenth(smollm, tmp_path):
    """The paper's setting on SmolLM2: layers 26 and 28, average-key, half of the experts."""
    report = emoe.convert(
        smollm, output=tmp_path / "out", preset="finetune", **(FAST | {"held_out_tokens": 2048, "sequence_length": 512})
    )
    assert report["converted_layers"] == [26, 28]
    rows = {row["top_k"]: row for row in report["quality"]["rows"]}
    assert max(layer["all_experts_error"] for layer in report["layers"]) < 1e-5
    assert 1.0 < rows[32]["ratio"] < 1.10


def test_gates_and_splits_rank_as_documented(minilm, tmp_path):
    """Co-activation loses less than random, the default gate less than average-key. MiniLM in full: in one layer of
    SmolLM2 they lie within the noise of 1,024 tokens."""
    folder, _, report = minilm
    lost = {"default": report["quality"]["rows"]}
    for name, changes in (("average-key", {"gate": "average-key"}), ("random", {"split": "random"})):
        settings = FAST | {"held_out_tokens": 1024} | changes
        lost[name] = emoe.convert(folder, output=tmp_path / name, **settings)["quality"]["rows"]
    at_a_quarter = {name: next(row["value"] for row in rows if row["top_k"] == 16) for name, rows in lost.items()}
    assert min(at_a_quarter, key=at_a_quarter.get) == "default"
