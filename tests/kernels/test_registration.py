"""Who makes `experts_implementation="emoe"` known to transformers, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emoe_kernels

CHECK = "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS; print('emoe' in ALL_EXPERTS_FUNCTIONS)"


@pytest.mark.parametrize(
    "code, registered",
    [
        ("import emoe; from transformers import AutoModelForCausalLM", True),
        ("from transformers import AutoModelForCausalLM; import emoe", True),
        ("import emoe_kernels.integrations.transformers", True),
        ("import emoe_kernels.experts", False),
    ],
)
def test_who_registers(code, registered):
    root = Path(emoe_kernels.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", f"{code}; {CHECK}"], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(registered), done.stderr
