"""Two processes make what one makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.masked import gate_tables, labels_of

import emoe


def launch(arguments: dict, *more: str) -> subprocess.CompletedProcess:
    """`accelerate launch … -m emoe convert …` with two gloo processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "emoe", "convert", "--quiet", *more]
    for key, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            command += ["--" + key.replace("_", "-"), str(item)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_shared_text_gives_one_process_s_result(tiny_llama, settings, tmp_path):
    """The same partition; gate tables, thresholds and quality up to the order of summation."""
    changes = {"batch_tokens": 256, "calibrate_in": "float32"}  # eight batches, four a process
    one = emoe.convert(str(tiny_llama), output=tmp_path / "one", **(settings | changes))
    done = launch({"model": tiny_llama, "output": tmp_path / "two", **settings, **changes})
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "emoe_report.json").read_text())
    assert two["processes"] == 2
    for index, labels_F in labels_of(tmp_path / "one").items():
        assert torch.equal(labels_F, labels_of(tmp_path / "two")[index])
    expected, found = gate_tables(tmp_path / "one"), gate_tables(tmp_path / "two")
    for name, table in expected.items():
        torch.testing.assert_close(found[name], table, rtol=1e-3, atol=1e-3, msg=name)
    for mine, theirs in zip(one["quality"]["rows"], two["quality"]["rows"], strict=True):
        assert theirs["value"] == pytest.approx(mine["value"], rel=1e-3)
        assert theirs["active"] == pytest.approx(mine["active"], abs=1e-2)
    assert two["quality"]["tokens"] == one["quality"]["tokens"]


def test_without_text_processes_share_the_layers(tiny_llama, tmp_path):
    """The same bytes: each layer is one process's own."""
    settings = {"experts": 8, "split": "weights", "gate": "average-key", "held_out_tokens": 0}
    emoe.convert(str(tiny_llama), output=tmp_path / "one", **settings)
    done = launch({"model": tiny_llama, "output": tmp_path / "two", **settings})
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in names:
        if name != "emoe_report.json":
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_bad_input_is_one_line_of_one_process(tiny_llama, settings, tmp_path):
    done = launch({"model": tiny_llama, "output": tmp_path / "two", **(settings | {"calibration": ["nowhere.txt"]})})
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("emoe: ")]) == 1
    assert not Path(tmp_path / "two").exists()
