"""Every Triton kernel, in every configuration of the table, compiled ahead of time: registers and shared memory.

Common forms of a kernel (`triton_report.name_of`) come in all tiles; rare ones and 64-bit offsets in bf16, and
fp16, in the tallest, which need most registers.

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

ARCHS = ("sm80", "sm90")


def run(*commands):
    """What Python processes print that import Triton for the compiler and run side by side: JSON, line by line."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    children = [subprocess.Popen([sys.executable, *command], **pipes) for command in commands]
    printed = [child.communicate() for child in children]
    for child, (_, err) in zip(children, printed, strict=True):
        assert child.returncode == 0, err[-4000:]
    return [json.loads(line) for out, _ in printed for line in out.splitlines()]


@pytest.fixture(scope="module")
def usages():
    command = ("-m", "emoe_kernels.experts.triton_report", "--json", "--arch")
    return [Usage(**line) for line in run(*((*command, arch) for arch in ARCHS))]


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_all_fits(usages, arch):
    here = [u for u in usages if u.arch == arch]
    for u in here:
        print(f"{u.arch:7} {u.dtype:5}{u.kernel:30}{u.config:20}{u.registers:4} registers{u.shared / 1024:7.1f} KiB")
    assert not [u for u in here if u.stack or u.local]
    assert not [u for u in here if u.shared > SHARED_LIMIT[arch]]
    assert all(0 < u.registers <= 255 for u in here)


def test_the_whole_table_is_compiled(usages):
    compiled = {(u.arch, u.dtype, u.kernel, u.config) for u in usages}
    for (arch, kind), kernels in configs.TABLE.items():
        for kernel, tiles in kernels.items():
            for t in tiles:
                for form in COMMON.get(kernel, (kernel,)):
                    assert (arch, kind, form, f"{t.bm}x{t.bn}x{t.bk} w{t.warps} s{t.stages}") in compiled
    for arch in ARCHS:
        assert {u.kernel for u in usages if u.arch == arch and u.dtype in ("half", "bf16", "i64", "i32")} >= OTHERS
        assert {u.kernel for u in usages if u.arch == arch and u.dtype == "fp16"} >= {
            "hidden",
            "project",
            "grad_weight",
        }


COMMON = {
    "linear": ("linear", "linear columns"),
    "project": ("project", "project columns", "project pair"),
    "grad_weight": ("grad_weight", "grad_weight columns"),
}
"""Forms that layers of common checkpoints need: "columns" is down in every dense one, and all weights in GPT-2."""

OTHERS = {
    *("plan_count", "plan_place", "combine", "activation_backward", "grad_bias"),
    *("hidden columns", "project pair columns", "linear by slot", "linear columns by slot", "project by slot"),
    *("project columns by slot", "grad_weight by slot", "grad_weight columns by slot", "activation_backward by slot"),
    *("grad_bias by slot", "hidden columns wide", "linear columns wide", "project columns wide"),
}


def test_stick_breaking_attention_does_not_spill():
    command = ("-m", "emoe_kernels.stickbreaking.triton_report", "--json", "--arch")
    found = [Usage(**line) for line in run(*((*command, arch) for arch in ARCHS))]
    for u in found:
        assert u.stack == 0 and u.local == 0 and 0 < u.registers <= 255, u
        assert u.shared <= SHARED_LIMIT["sm80"], u
    names = ("forward", "carry", "grad_query", "grad_key")
    widths = {"half": (64, 128, 1024), "tf32": (64, 1024), "ieee": (32, 1024)}
    wanted = {(arch, kind, f"{n} A {A}") for arch in ARCHS for kind in widths for A in widths[kind] for n in names}
    assert {(u.arch, u.dtype, u.kernel) for u in found} == wanted


SPILL = """
import json, torch
from emoe_kernels.experts import triton_report as report
full = [l for l in report.launches("sm80", torch.float32) if report.name_of(l) == "project pair"][-1]
tall = full._replace(constants=full.constants | {"BM": 128, "BN": 128, "BK": 32}, warps=4)
print(json.dumps(report.measure(tall, "sm80", "ieee")._asdict()))
"""


def test_the_sign_of_a_spill_is_seen():
    """128 x 128 in full fp32 on four warps needs more registers than there are: the stack must show."""
    (usage,) = run(("-c", SPILL))
    assert usage["stack"] > 0
