"""A task, a model cut into experts, and a call of `finetune` that takes a second."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.labelled import write_task

import emoe

LAYERS = [2, 3]
"""Converted layers of the tiny models."""


@pytest.fixture(scope="session")
def task_file(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def experts(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama with 8 experts in two layers, 4 a token, average-key."""
    output = tmp_path_factory.mktemp("experts") / "llama"
    emoe.convert(
        str(tiny_llama),
        output=output,
        preset="finetune",
        experts=8,
        top_k=4,
        layers="2:4",
        held_out_tokens=0,
        routing="top-k",
        allocation="uniform",
    )
    return output


@pytest.fixture
def killed_in_removing(monkeypatch):
    """``with killed_in_removing():`` - the first folder that is removed there keeps all but its first files."""

    def cut(folder, *arguments, **keywords):
        found = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".json"))
        if found:
            for path in found[:2]:
                path.unlink()
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def run():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", cut)
            yield

    return run


@pytest.fixture
def arm_settings(experts, task_file, tmp_path):
    """Makes a `FinetuneConfig` that trains eight steps in fp32."""
    from emoe.finetuning.settings import FinetuneConfig

    def make(**changes: Any) -> FinetuneConfig:
        given: dict[str, Any] = {
            "model": str(experts),
            "task": str(task_file),
            "output": str(tmp_path / "out"),
            "max_steps": 8,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "eval_steps": 4,
            "log_steps": 2,
            "precision": "float32",
        }
        return FinetuneConfig(**(given | changes))

    return make
