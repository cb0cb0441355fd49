"""The programs that train and time ModuleFormers run from end to end on tiny ones."""

from __future__ import annotations

import json
import sys

import pytest
import transformers
import yaml
from support.scripts import script

ARCHITECTURE = {
    **{"model_type": "moduleformer", "n_embd": 16, "n_layer": 2, "n_head": 2, "att_hidden": 8, "ffd_hidden": 16},
    **{"gating_size": 8, "n_att_experts": 4, "n_mlp_experts": 4},
}
SETTINGS = {
    **{"vocabulary": 300, "sequence_length": 16, "tokens_per_step": 64, "batch_sequences": 2, "steps": 2},
    **{"held_out_tokens": 256, "log_steps": 1, "precision": "float32"},
}


@pytest.fixture
def train(tmp_path, text_file, monkeypatch):
    """``train(arms, *flags)`` → what train_moduleformer.py wrote; configurations of the same names, but tiny."""
    module = script("train_moduleformer")
    other = {"tiny": {"aux_loss_weight": 0.02}, "tiny-switch": {"aux_loss_type": "switch", "aux_loss_weight": 0.02}}
    other["tiny-dense"] = {"gate_type": "all", "k_att": 4, "k_mlp": 4}
    for stem, fields in other.items():
        text = yaml.safe_dump({**SETTINGS, "architecture": ARCHITECTURE | fields})
        (tmp_path / f"{stem}.yaml").write_text(text)
    gpt2 = {"model_type": "gpt2", "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "gpt2.yaml").write_text(yaml.safe_dump({**SETTINGS, "corpus": ["fiction"], "architecture": gpt2}))
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr(module, "GPT2", tmp_path / "gpt2.yaml")
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "more.txt").write_text(text_file.read_text()[::-1])
    corpora = ("--corpus", f"words={text_file}", "--corpus", f"drow={tmp_path / 'more.txt'}")

    def call(arms: str, *flags) -> dict | None:
        output = tmp_path / "result.json"
        flags = ("--arms", arms, *corpora, "--folder", tmp_path / "work", "--output", output, *flags)
        monkeypatch.setattr(sys, "argv", ["train_moduleformer", *map(str, flags)])
        module.main()
        return json.loads(output.read_text()) if output.is_file() else None

    return call


def test_arms(train, tmp_path):
    """A second call trains nothing, measures the checkpoints again and finds the same."""
    result = train("tiny,tiny-switch,tiny-dense")
    mutual, switch, dense = result["arms"].values()
    assert set(mutual["over_training"][-1]) == {"step", "attention", "ffn"}
    assert mutual["over_training"][-1]["ffn"]["marginal"] <= mutual["over_training"][-1]["ffn"]["most"] + 1e-6
    for part in ("attention", "ffn"):
        of = switch["divergence"][part]
        assert 0 < of["probability"][0][1] < of["load"][0][1]  # gates that have hardly learnt: near ties
    assert dense["divergence"] is None
    assert set(mutual["longer"]) == {"16", "32", "64"} and mutual["longer"]["16"] == mutual["perplexity"]
    page = (tmp_path / "result.md").read_text()
    assert page.count("| attention |") == page.count("| FFN |") == 2
    assert (tmp_path / "result.png").stat().st_size > 10_000
    weights = tmp_path / "work" / "tiny" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    report = tmp_path / "work" / "tiny" / "emoe_pretrain.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"perplexity": {}, "gates": {}}))
    assert train("tiny,tiny-switch,tiny-dense")["arms"] == result["arms"]
    assert weights.stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match="other settings"):
        train("tiny", "--steps", 3)


def test_gpt2_goes_into_the_cache(train, tmp_path):
    assert train("gpt2") is None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "home" / "trained" / "gpt2-small-corpus")
    assert type(model).__name__ == "GPT2LMHeadModel"


def test_speeds(tmp_path, monkeypatch, capsys):
    module = script("bench_moduleformer")
    monkeypatch.setattr(module, "memory", lambda name, *rest: 1 << 20 if name == "bare" else 2 << 20)  # 18 processes
    sizes = ("--width", "16", "--layers", "1", "--rounds", "1", "--dtypes", "float32")
    monkeypatch.setattr(sys, "argv", ["bench", *sizes, "--output", str(tmp_path / "speeds.json")])
    module.main()
    rows = json.loads((tmp_path / "speeds.json").read_text())["rows"]
    assert len(rows) == 9 and all(row["tokens_per_second"] > 0 for row in rows)
    active = {row["model"]: row["parameters"]["active"] for row in rows}
    assert active["dense, equal total"] > active["dense, equal active"]
    assert (tmp_path / "speeds.md").read_text().count("| float32 |") == 9
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench", *sizes, "--memory", "ModuleFormer", "decode", "float32"])
    module.main()
    assert int(capsys.readouterr().out) > 1 << 20
