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
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor


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
    """Loads in flight; shared memory grows with it. Where a load waits for another (in grad_weight that of x for the
    slot numbers) Triton's pipeliner keeps about half as many tiles."""


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
# 32 rows on four warps spill a register or two with Triton 3.8 and 3.9, though not with 3.7.
_IEEE = {
    "hidden": (Config(16, 32, 32, 4, 2), Config(32, 64, 32, 8, 2), Config(64, 32, 16, 4, 2)),
    "linear": (Config(16, 64, 32, 4, 2), Config(32, 64, 32, 8, 2), Config(64, 64, 16, 4, 2)),
    "project": (Config(16, 64, 32, 4, 2), Config(32, 64, 32, 8, 2), Config(64, 64, 16, 4, 2)),
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
"""(architecture, arithmetic) to kernel to tiles. `architecture` says which GPUs a row serves."""

CACHE_VARIABLE = "EMOE_TRITON_CONFIGS"
"""Environment variable: the file with the user's own configurations."""


def arithmetic(dtype: torch.dtype) -> str:
    """ "half" for 16-bit tensors; for fp32 "tf32" if the user allows it for torch's own matmul, else "ieee".

    On AMD fp32 is "ieee": only gfx942 has something like TF32.
    """
    if dtype != torch.float32:
        return "half"
    if torch.version.hip is not None:
        return "ieee"
    settings = torch.backends.cuda.matmul
    # fp32_precision came with torch 2.9; asking for the older name raises once the newer one has been set
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 else "ieee"


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table that serves this device; sm80 for whatever the table does not know."""
    if device.type == "cuda" and torch.version.hip is None:
        # sm100 grants as much shared memory as sm90; sm120 (RTX 50), for all its number, 99 KiB like sm86 and sm89
        return "sm90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm80"
    return "sm80"


@functools.cache
def device_name(device: torch.device) -> str:
    """What measurements are filed under: those of an A100 say little about an RTX 4090, though both read one table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Case(NamedTuple):
    """What a user's own configuration was measured for."""

    device: str
    """As `device_name` has it."""
    kind: str
    """As `arithmetic` has it."""
    kernel: str
    rows: int
    """As `rows_per_block` has it."""
    S: int
    D: int
    layout: str
    """As `layout` has it."""

    def __str__(self) -> str:
        return f"{self.device}/{self.kind}/{self.kernel}/bm{self.rows}/S{self.S}/D{self.D}/{self.layout}"


def layout(weight_ESD: Tensor) -> str:
    """ "rows" if neighbours in D are neighbours in memory, as in a dense (F, D) matrix; "columns" as in (D, F)."""
    return "rows" if weight_ESD.stride(2) == 1 else "columns"


def cache_path() -> Path:
    """Where `tune` writes: $EMOE_TRITON_CONFIGS, or emoe/triton.json in the user's cache directory."""
    if path := os.environ.get(CACHE_VARIABLE):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe" / "triton.json"


@functools.cache
def user_configs() -> dict[str, Config]:
    """The user's own configurations by `str(Case)`, read once a process.

    None, with a warning, if the file is broken. No file is no mistake, unless EMOE_TRITON_CONFIGS names one.
    """
    path = cache_path()
    try:
        return {key: _checked(key, values) for key, values in json.loads(path.read_text()).items()}
    except FileNotFoundError as error:
        if not os.environ.get(CACHE_VARIABLE):
            return {}
        reason = error.strerror
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    warnings.warn(f"{path} ({CACHE_VARIABLE}) is not used, the built-in table is: {reason}", stacklevel=2)
    return {}


def _checked(key: str, values: list[int]) -> Config:
    """ValueError for what no kernel can be launched with."""
    config = Config(*values)
    tile = (config.bm, config.bn, config.bk)
    whole = all(type(value) is int for value in config)
    if not (whole and all(size >= 16 and size & (size - 1) == 0 for size in tile)):
        raise ValueError(f"{key}: the tile {tile} is not of powers of two from 16 up")
    if config.warps not in (1, 2, 4, 8) or not 1 <= config.stages <= 6:
        raise ValueError(f"{key}: warps={config.warps}, stages={config.stages}; expected 1, 2, 4 or 8, and 1 to 6")
    return config


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


def choose(arch: str, case: Case) -> Config:
    """The tile to use: the user's own if measured, else the candidate that wastes least.

    Least columns after padding S (D for `project`) to whole tiles, and 16 more a tile for reading the other operand
    again: a guess in the right order of magnitude, which `tune` replaces by a measurement.
    """
    own = user_configs()
    if own and (config := own.get(str(case))) is not None:
        return config
    tiles = candidates(arch, case.kind, case.kernel, case.rows)
    if case.kernel == "project":
        return min(tiles, key=lambda t: -(-case.D // t.bn) * (t.bn + 16))
    width = (lambda t: t.bm) if case.kernel == "grad_weight" else (lambda t: t.bn)
    return min(tiles, key=lambda t: -(-case.S // width(t)) * (width(t) + 16))
