"""Each command as a user types it, on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

import emoe
from emoe.cli.main import main
from emoe.config import resolve_config


def test_convert_inspect_export(tiny_llama, text_file, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_llama), "--experts", "8", "--layers", "1:4:2", "--calibration", str(text_file)]
    arguments += ["--calibration-tokens", "2048", "--held-out-tokens", "512", "--sequence-length", "64"]
    assert main(["convert", *arguments, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert "preset 'fast': no --preset was given" in captured.err
    assert "unless --layers is given" in captured.err
    assert "perplexity" in captured.out

    assert main(["inspect", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [1, 3]
    assert found["gate_entries"] == 2 * 8 * (32 + 1 + 3)
    rows = found["report"]["quality"]["rows"]
    assert [row["top_k"] for row in rows] == [2, 4, 6]
    assert [row["active"] for row in rows] == pytest.approx([0.25, 0.5, 0.75], abs=0.1)
    assert rows[0]["ffn_flops"] < rows[1]["ffn_flops"] < rows[2]["ffn_flops"]
    assert all(layer["all_experts_error"] < 1e-5 for layer in found["report"]["layers"])

    assert main(["inspect", str(output)]) == 0
    assert "trainable parameters" in capsys.readouterr().out

    assert main(["export", "--model", str(output), "--to", "dense", "--output", str(tmp_path / "dense")]) == 0
    assert "2 of 2 converted layers have exactly the source's weights" in capsys.readouterr().out

    # The settings written beside the model make the same model again.
    settings = yaml.safe_load((output / "emoe_config.yaml").read_text())
    assert settings["layers"] == "1:4:2"
    again = ["convert", "--config", str(output / "emoe_config.yaml"), "--output", str(tmp_path / "again"), "--quiet"]
    assert main(again) == 0
    for name in ("partition.safetensors", "config.json", "model-00002-of-00005.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


WEIGHTS = {"split": "weights", "gate": "average-key", "held_out_tokens": 0}


def test_convert_needs_only_a_model_and_a_number(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [part for key, value in WEIGHTS.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["convert", "--model", str(tiny_llama), "--experts", "8", *flags]) == 0
    assert capsys.readouterr().out.endswith(f"written: {tiny_llama.name}-emoe\n")
    assert (tmp_path / f"{tiny_llama.name}-emoe" / "config.json").is_file()
    shutil.move(tmp_path / f"{tiny_llama.name}-emoe", tmp_path / "first")
    emoe.convert(tiny_llama, experts=8, **WEIGHTS)
    assert (tmp_path / f"{tiny_llama.name}-emoe" / "config.json").is_file()


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("llama2-7b", "llama2-7b-emoe"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf-emoe"),
        ("models/Llama-2.gguf", "Llama-2-emoe"),
        ("models/mine/", "mine-emoe"),
        ("/models/mine/..", "models-emoe"),
    ],
)
def test_an_output_is_named_after_its_model(model, output):
    assert resolve_config({"model": model, "experts": 8})[0].output == output


def test_flags_win_over_the_file_and_the_file_over_the_preset(tiny_llama, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("preset: finetune\nexperts: 6\ngate: representative\n")
    arguments = ["convert", "--model", str(tiny_llama), "--config", str(tmp_path / "c.yaml"), "--experts", "8"]
    assert main([*arguments, "--output", str(tmp_path / "x"), "--dry-run"]) == 0
    error = capsys.readouterr().err
    assert "preset 'finetune'" in error
    assert "experts: 8 of 6 neurons, 4 a token; split weights, gate representative" in error
    assert "layers: 0, 2" in error


def test_estimate_and_models(capsys):
    assert main(["estimate", "--model", "llama2-7b", "--experts", "64", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["parameters"] == 6_738_415_616
    assert costs["layers"] == 32
    assert costs["layer_bytes"] == 2 * 202_383_360
    assert main(["models", "--json"]) == 0
    rows = {row["alias"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["llama2-7b"]["gated"]
    assert rows["smollm2-135m"]["package"]
