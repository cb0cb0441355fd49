"""A converted folder needs nothing but torch and transformers, in an environment that has nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.routing import KEY
from support.tiny import VOCAB

from emoe_kernels import use

TOKENS = torch.randint(5, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))

LOAD = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("emoe", "emoe_kernels", "peft", "accelerate", "datasets"))
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
tokens = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder with torch, transformers and what these two require, and nothing else of this environment."""
    folder = tmp_path_factory.mktemp("bare")
    wanted, seen = ["torch", "transformers"], set()
    while wanted:
        name = wanted.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform
        if found.metadata["Name"] in seen:
            continue
        seen.add(found.metadata["Name"])
        for path in {str(file).split("/")[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / path).exists():
                (folder / path).symlink_to(found.locate_file(path))
        needed = (entry for entry in found.requires or [] if "extra ==" not in entry)
        wanted += [re.match(r"[\w.\-]+", entry).group() for entry in needed]
    assert {"torch", "transformers"} <= seen
    return folder


@pytest.mark.parametrize("given", [{"held_out_tokens": 0}, {"held_out_tokens": 0, "compensate": True}, KEY])
def test_same_logits_with_only_torch_and_transformers(given, bare, converted, tmp_path):
    source, out = converted(**given), tmp_path / "logits.safetensors"
    command = [sys.executable, "-I", "-S", "-c", LOAD, str(bare), str(source), str(out)]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        with torch.no_grad(), use("portable"):
            assert torch.equal(load_file(out)["logits"], model(TOKENS).logits)
    finally:
        torch.set_num_threads(threads)
