"""Launch configurations of the Triton kernels: an explicit table, a heuristic default and a user's own measurements.

Nobody has timed these on a GPU yet. They come from the resources they take, which `triton_report.py` prints and a
test holds: no spilled register, shared memory within what the architecture grants. `triton_tune.tune` measures on the
GPU at hand and writes what it finds to the user's cache, which goes before the table.

There is no `triton.autotune`: it needs a driver even to define a kernel for the interpreter, and its first call costs
seconds in the middle of a training step.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Tile of one program. For a GEMM of (M, K) by (K, N) tiles; which is which depends on the kernel:

    hidden (gated), linear: M rows of an expert, N neurons, K columns of D at a time
    project:                M rows of an expert, N columns of D, K neurons at a time
    grad_weight:            M neurons, N columns of D, K rows of an expert at a time
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    """Loads in flight; shared memory grows with it. grad_weight gets half: its loads of x wait for slot numbers."""


# 16-bit inputs. sm80 stays under 99 KiB of shared memory, so that sm86 and sm89 (RTX 30 and 40) can use it too.
# hidden has two sums a neuron (gate and up): 128 x 128 would spill.
_HALF_SM80 = {
    "hidden": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 3),
        Config(128, 64, 32, 8, 4),
    ),
    "linear": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 3),
        Config(64, 128, 32, 4, 4),
        Config(128, 64, 64, 8, 3),
        Config(128, 128, 32, 8, 4),
    ),
    "project": (
        Config(16, 128, 32, 4, 3),
        Config(32, 128, 32, 4, 3),
        Config(64, 128, 32, 4, 3),
        Config(128, 128, 32, 8, 3),
    ),
    "grad_weight": (Config(64, 128, 32, 4, 5), Config(128, 128, 32, 8, 5)),
}

# Hopper multiplies from shared memory (wgmma, 64 rows a warp group) and has more of it.
_HALF_SM90 = {
    "hidden": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(128, 64, 64, 8, 4),
    ),
    "linear": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(64, 128, 64, 4, 4),
        Config(128, 64, 64, 8, 4),
        Config(128, 128, 64, 8, 4),
    ),
    "project": (
        Config(16, 128, 32, 4, 3),
        Config(32, 128, 32, 4, 3),
        Config(64, 128, 32, 4, 3),
        Config(128, 128, 32, 8, 3),
    ),
    "grad_weight": (Config(64, 128, 64, 4, 5), Config(128, 128, 64, 8, 5)),
}

# fp32 on tensor cores: the same bytes as 16-bit with half the depth.
_TF32 = {
    "hidden": (Config(16, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(128, 64, 16, 8, 3)),
    "linear": (Config(16, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(128, 64, 32, 8, 3)),
    "project": (Config(16, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(128, 64, 16, 8, 3)),
    "grad_weight": (Config(64, 64, 32, 4, 5),),
}

# fp32 in full: no tensor cores, operands in registers as well as the sums, so tiles are small (128 x 128 spills).
_IEEE = {
    "hidden": (Config(16, 32, 32, 4, 2), Config(32, 32, 32, 4, 2), Config(64, 32, 16, 4, 2)),
    "linear": (Config(16, 64, 32, 4, 2), Config(32, 64, 32, 4, 2), Config(64, 64, 16, 4, 2)),
    "project": (Config(16, 64, 32, 4, 2), Config(32, 64, 32, 4, 2), Config(64, 64, 16, 4, 2)),
    "grad_weight": (Config(32, 64, 32, 4, 2),),
}

TABLE: dict[tuple[str, str], dict[str, tuple[Config, ...]]] = {
    ("sm80", "half"): _HALF_SM80,
    ("sm90", "half"): _HALF_SM90,
    ("sm80", "tf32"): _TF32,
    ("sm90", "tf32"): _TF32,
    ("sm80", "ieee"): _IEEE,
    ("sm90", "ieee"): _IEEE,
}
"""(architecture, arithmetic) to kernel to tiles. An architecture stands for all up to the next one in the table."""

CACHE_VARIABLE = "EMOE_TRITON_CONFIGS"
"""Environment variable: the file with the user's own configurations."""


def arithmetic(dtype: torch.dtype) -> str:
    """ "half" for 16-bit tensors; for fp32 "tf32" if the user allows it for torch's own matmul, else "ieee"."""
    if dtype != torch.float32:
        return "half"
    settings = torch.backends.cuda.matmul
    # fp32_precision came with torch 2.9; asking for the older name raises once the newer one has been set
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 else "ieee"


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table that serves this device; sm80 for whatever the table does not know."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        return "sm90"
    return "sm80"


def cache_path() -> Path:
    """Where `tune` writes: $EMOE_TRITON_CONFIGS, or emoe/triton.json in the user's cache directory."""
    if path := os.environ.get(CACHE_VARIABLE):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe" / "triton.json"


@functools.cache
def user_configs() -> dict[str, Config]:
    """The user's own configurations by `key`; empty if there is no readable file. Read once a process."""
    try:
        return {key: Config(*values) for key, values in json.loads(cache_path().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(found: dict[str, Config]) -> Path:
    """Add configurations to the user's file, and use them from now on. Returns the file."""
    path = cache_path()
    merged = {**user_configs(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps({name: list(config) for name, config in sorted(merged.items())}, indent=1))
    fresh.replace(path)  # at once: another process may be reading
    user_configs.cache_clear()
    return path


def key(arch: str, kind: str, kernel: str, bm: int, S: int, D: int) -> str:
    """Name of a case in the user's cache."""
    return f"{arch}/{kind}/{kernel}/bm{bm}/S{S}/D{D}"


def rows_per_block(pairs: int, num_experts: int) -> int:
    """Block height: the mean number of rows an expert, as a power of two between 16 and 128.

    A fixed 128 (ScatterMoE) multiplies 8 times too much at 16 rows an expert; 16 is the least that tl.dot takes.
    """
    return max(16, min(128, triton.next_power_of_2(-(-pairs // num_experts))))


def candidates(arch: str, kind: str, kernel: str, rows: int) -> tuple[Config, ...]:
    """The table's tiles for blocks of `rows` rows: those of the smallest height that holds them."""
    tiles = TABLE[arch, kind][kernel]
    if kernel == "grad_weight":  # its rows are walked through, not tiled
        return tiles
    height = min((t.bm for t in tiles if t.bm >= rows), default=max(t.bm for t in tiles))
    return tuple(t for t in tiles if t.bm == height)


def choose(arch: str, kind: str, kernel: str, rows: int, S: int, D: int) -> Config:
    """The tile to use: the user's own if measured, else the candidate that wastes least.

    Least columns after padding S (D for `project`) to whole tiles, and 16 more a tile for reading the other operand
    again: a guess in the right order of magnitude, which `tune` replaces by a measurement.
    """
    if (own := user_configs().get(key(arch, kind, kernel, rows, S, D))) is not None:
        return own
    tiles = candidates(arch, kind, kernel, rows)
    if kernel == "project":
        return min(tiles, key=lambda t: -(-D // t.bn) * (t.bn + 16))
    width = (lambda t: t.bm) if kernel == "grad_weight" else (lambda t: t.bn)
    return min(tiles, key=lambda t: -(-S // width(t)) * (width(t) + 16))
