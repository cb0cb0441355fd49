"""Code in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_fresh(code: str, *arguments: object) -> str:
    """Run code in a process of its own; its standard output."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOAD = """
    import os, sys
    hide, *pairs = sys.argv[1:]  # "with" or "without" our packages, then a folder and where its logits go, and so on
    if hide == "without":
        sys.modules["emoe"] = sys.modules["emoe_kernels"] = None  # as if they were not installed
    else:
        import emoe
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    tokens = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(2))
    trusted = True if hide == "without" else None
    for folder, out in zip(pairs[::2], pairs[1::2]):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted).eval()
        with torch.no_grad():
            save_file({"logits": model(tokens).logits}, out)
        print(type(model).__module__)
"""
