"""A converted folder needs nothing but torch and transformers, in an environment that has nothing else."""

from __future__ import annotations

import importlib.metadata
import json
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
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("emoe", "emoe_kernels", "peft", "accelerate", "datasets"))
import torch, transformers
from safetensors.torch import save_file
torch.set_num_threads(1)
tokens = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(2))
logits = {}
for name, (auto, folder) in json.loads(sys.argv[2]).items():
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits[name] = model(tokens).logits
save_file(logits, sys.argv[3])
"""

PLAIN = {"held_out_tokens": 0}
CASES = {
    "discriminant gate": ("llama", PLAIN),
    "compensation": ("llama", PLAIN | {"compensate": True}),
    "average-key gate": ("llama", KEY),
    "transposed matrices": ("gpt2", PLAIN),
    "encoder": ("bert", PLAIN),
}
"""Family and settings of a conversion."""


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


@pytest.fixture(scope="module")
def models(converted) -> dict[str, tuple[str, Path]]:
    """Auto class and folder of every case."""
    autos = {"bert": "AutoModelForMaskedLM"}
    return {
        name: (autos.get(family, "AutoModelForCausalLM"), converted(family, **given))
        for name, (family, given) in CASES.items()
    }


@pytest.fixture(scope="module")
def logits(bare, models, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Of every case, from one process in that folder."""
    place = tmp_path_factory.mktemp("logits")
    given = json.dumps({name: (auto, str(folder)) for name, (auto, folder) in models.items()})
    command = [sys.executable, "-I", "-S", "-c", LOAD, str(bare), given, str(place / "logits.safetensors")]
    environment = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(place / "logits.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_same_logits_with_only_torch_and_transformers(case, logits, models):
    auto, folder = models[case]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        with torch.no_grad(), use("portable"):
            assert torch.equal(logits[case], model(TOKENS).logits)
    finally:
        torch.set_num_threads(threads)
