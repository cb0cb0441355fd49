"""Two processes train what one does with the doubled batch; sharded weights come out whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from emoe.finetuning.tune import finetune


def launch(config, *more: str) -> None:
    """`torchrun -m emoe finetune …` with two gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "emoe", "finetune", "--quiet", *more]
    values = config.model_dump(exclude_defaults=True)
    command += [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "seed-0" / "model" / "model.safetensors")


def test_two_processes_equal_one_with_the_doubled_batch(arm_settings, tmp_path):
    """Losses on gates too, whose means are over the tokens of both."""
    given = {"method": "emoe-learn", "mi_weight": 0.1, "switch_weight": 0.1, "max_steps": 4}
    (one,) = finetune(arm_settings(**given, batch_size=8, output=str(tmp_path / "one")))
    launch(arm_settings(**given, batch_size=4, output=str(tmp_path / "two")))
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], expected, rtol=1e-3, atol=2e-4, msg=name)
    two = json.loads((tmp_path / "two" / "seed-0" / "run.json").read_text())
    assert two["processes"] == 2
    for name, facts in one["readings"]["as-trained"].items():
        assert two["readings"]["as-trained"][name]["examples"] == facts["examples"]
        assert two["readings"]["as-trained"][name]["score"] == pytest.approx(facts["score"], abs=0.05)


def test_sharded_weights_train_and_are_saved_whole(arm_settings, tiny_llama, tmp_path):
    """From a dense model, which both processes cut into experts together."""
    cut = {"model": str(tiny_llama), "experts": 8, "top_k": 4, "layers": "2:4", "max_steps": 4}
    (one,) = finetune(arm_settings(**cut, batch_size=8, output=str(tmp_path / "one")))
    launch(arm_settings(**cut, batch_size=4, output=str(tmp_path / "two")), "--fsdp")
    for name, expected in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], expected, rtol=1e-3, atol=2e-4, msg=name)
    folder = tmp_path / "two" / "seed-0" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "EMoELlamaForSequenceClassification"
    two = json.loads((tmp_path / "two" / "seed-0" / "run.json").read_text())
    assert set(two["readings"]) == set(one["readings"])
