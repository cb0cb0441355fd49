"""Tiny models with modules of both kinds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.modules import moduleformer
from support.tiny import tiny_model, tiny_tokenizer

import emoe
from emoe.checkpoint.digests import NAME as DIGESTS


@pytest.fixture(scope="session")
def tiny_moduleformer(tmp_path_factory) -> Path:
    """A ModuleFormer with linear gates."""
    return moduleformer(tmp_path_factory.mktemp("moduleformer") / "model", "linear")


@pytest.fixture(scope="session")
def bfloat16_moduleformer(tmp_path_factory) -> Path:
    """The same, stored in 16 bits."""
    return moduleformer(tmp_path_factory.mktemp("bfloat16") / "model", "linear", torch.bfloat16)


@pytest.fixture(scope="session")
def bfloat16_llama(settings, tmp_path_factory) -> Path:
    """A tiny Llama stored in 16 bits, converted: its gates' tables are fp32."""
    folder = tmp_path_factory.mktemp("bfloat16")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder / "dense")
    tiny_tokenizer(folder / "dense")
    emoe.convert(str(folder / "dense"), output=folder / "moe", **settings)
    return folder / "moe"


@pytest.fixture(scope="session")
def cosine(tiny_llama, settings, tmp_path_factory) -> Path:
    """A converted model with cosine gates, which conversion does not make: drawn at random."""
    folder, saved = (tmp_path_factory.mktemp("cosine") / name for name in ("converted", "saved"))
    emoe.convert(str(tiny_llama), output=folder, **settings | {"gate": "average-key", "split": "weights"})
    config = transformers.AutoConfig.from_pretrained(folder)
    config.emoe_gate = "cosine"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    for ffn in model.sparse_ffns().values():
        ffn.router.cosine.centroids.weight.data.normal_()
    model.save_pretrained(saved)
    for file in folder.iterdir():
        if not (saved / file.name).exists() and "safetensors" not in file.name and file.name != DIGESTS:
            shutil.copyfile(file, saved / file.name)
    return saved


@pytest.fixture
def text(text_file) -> tuple:
    """Flags that count on a little text."""
    return ("--text", text_file, "--tokens", 2048, "--sequence-length", 64)


@pytest.fixture
def run(tmp_path):
    """``run("prune", model, "name", *flags)`` → the folder that was written."""
    from emoe.cli.main import main

    def call(verb: str, model, name: str, *flags) -> Path:
        output = tmp_path / name
        assert main([verb, "--model", str(model), "--output", str(output), "--quiet", *map(str, flags)]) == 0
        return output

    return call
