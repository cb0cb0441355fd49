"""Every Triton kernel, in every configuration of the table, compiled ahead of time: registers and shared memory.

Compiling needs neither a GPU nor a driver, but Triton must not have been imported to interpret: so it happens in a
process of its own. Triton keeps what it compiled (TRITON_CACHE_DIR), and a second run takes seconds.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from emoe_kernels.experts import triton_configs as configs
from emoe_kernels.experts.triton_report import SHARED_LIMIT, Usage


def run(*command):
    """A Python process that imports Triton for the compiler."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert child.returncode == 0, child.stderr[-4000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.fixture(scope="module")
def usages():
    lines = run("-m", "emoe_kernels.experts.triton_report", "--json", "--arch", "sm80", "sm90")
    return [Usage(**line) for line in lines]


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_nothing_spills_and_all_fits(usages, arch):
    here = [u for u in usages if u.arch == arch]
    for u in here:
        print(f"{u.arch} {u.dtype:5}{u.kernel:21}{u.config:20}{u.registers:4} registers{u.shared / 1024:7.1f} KiB")
    assert not [u for u in here if u.stack or u.local]
    assert not [u for u in here if u.shared > SHARED_LIMIT[arch]]
    assert all(0 < u.registers <= 255 for u in here)


def test_the_whole_table_is_compiled(usages):
    compiled = {(u.arch, u.dtype, u.kernel.removesuffix(" columns"), u.config) for u in usages}
    for (arch, kind), kernels in configs.TABLE.items():
        for kernel, tiles in kernels.items():
            for t in tiles:
                assert (arch, kind, kernel, f"{t.bm}x{t.bn}x{t.bk} w{t.warps} s{t.stages}") in compiled
    others = {"plan_count", "plan_place", "combine", "activation_backward", "grad_bias"}
    assert others <= {u.kernel for u in usages if u.arch == "sm90"}


SPILL = """
import json, torch
from emoe_kernels.experts import triton_report as report
full = [l for l in report.launches("sm80", torch.float32) if report.name_of(l) == "project"][-1]
tall = full._replace(constants=full.constants | {"BM": 128, "BN": 128, "BK": 32}, warps=4)
print(json.dumps(report.measure(tall, "sm80", "ieee")._asdict()))
"""


def test_the_sign_of_a_spill_is_seen():
    """128 x 128 in full fp32 on four warps needs more registers than there are: the stack must show."""
    (usage,) = run("-c", SPILL)
    assert usage["stack"] > 0
