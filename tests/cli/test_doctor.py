"""`emoe doctor` tells what will run, in the words of the dispatch itself."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
import torch

from emoe.cli.main import main
from emoe_kernels import dispatch, extension


@pytest.fixture(autouse=True)
def _nothing_decided(monkeypatch):
    monkeypatch.delenv("EMOE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_settled", {})


@pytest.fixture
def diagnosis(capsys):
    def run() -> dict:
        capsys.readouterr()
        assert main(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def with_extension(monkeypatch, available: bool, detail: str) -> None:
    monkeypatch.setattr(extension, "status", lambda: extension.Status(available, detail, None))
    monkeypatch.setattr(extension, "load", lambda: available)


def test_it_says_what_runs_and_why(diagnosis, monkeypatch):
    with_extension(monkeypatch, False, "no compiler")
    found = diagnosis()
    assert found["devices"][0] == {"device": "cpu", "implementation": "portable", "reason": "no compiler"}
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu"]["threads"] == torch.get_num_threads()
    with_extension(monkeypatch, True, "compiled")
    assert diagnosis()["devices"][0]["implementation"] == "cpu"


def test_it_says_what_the_dispatch_then_does(diagnosis):
    """On this machine as it is. Nothing is compiled for it."""
    said = diagnosis()["devices"][0]
    assert said == {"device": "cpu", "implementation": dispatch.explain().name, "reason": dispatch.explain().reason}


def test_gpus(diagnosis, monkeypatch):
    """What it would say on a machine with two; the Triton kernels are imported, not run."""
    from types import SimpleNamespace

    gpu = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(dispatch, "_triton", lambda device_type: (True, "Triton 9.9"))
    found = diagnosis()
    assert [row["device"] for row in found["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    assert found["devices"][2] == {"device": "cuda:1", "implementation": "triton", "reason": "Triton 9.9"}
    assert found["gpus"][0] == {"name": "H100", "capability": "9.0", "memory_bytes": 80 << 30}


def test_the_environment_variable(diagnosis, monkeypatch, capsys):
    monkeypatch.setenv("EMOE_KERNELS", "reference")
    found = diagnosis()
    assert found["EMOE_KERNELS"] == "reference"
    assert found["devices"][0]["implementation"] == "reference"

    monkeypatch.setenv("EMOE_KERNELS", "triton")
    row = diagnosis()["devices"][0]
    assert row["implementation"] is None
    assert "'triton' was asked for on cpu" in row["reason"]

    monkeypatch.setenv("EMOE_KERNELS", "tritn")
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [
        "emoe: EMOE_KERNELS='tritn' is not an implementation; known: reference, portable, cpu, triton, auto"
    ]


def test_for_people(monkeypatch, capsys):
    with_extension(monkeypatch, False, "no compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (
        "; 1 thread on ",
        "portable",
        "no compiler",
        "EMOE_KERNELS: not set",
        f"torch {torch.__version__.split('+')[0]}",
        "GPUs:",
    ):
        assert word in out


def test_packages_that_can_be_done_without(monkeypatch, capsys):
    """All that the docs name as a further requirement, there or not."""
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    extras = [settings["options.extras_require"][name] for name in ("lm-eval", "quantisers", "trl")]
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for text in extras for line in text.split()}
    assert names >= {"trl", "torchao", "bitsandbytes", "lm_eval"}
    known = {"trl": "9.1", "gguf": "9.2"}
    monkeypatch.setattr("emoe.cli.doctor._version", known.get)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    (line,) = (line for line in shown.out.splitlines() if line.startswith("versions:"))
    for name in names | {"gguf", "peft"}:
        assert f"{name} {known.get(name, 'not installed')}" in line


def test_build(monkeypatch, capsys):
    with_extension(monkeypatch, True, "compiled")
    assert main(["doctor", "--build"]) == 0
    with_extension(monkeypatch, False, "no compiler")
    assert main(["doctor", "--build"]) == 2
    assert "emoe: --build: no compiler" in capsys.readouterr().err
