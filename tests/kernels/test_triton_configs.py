"""What the host decides about the Triton kernels: tiles, grids, the row of the table, the user's own measurements.

Nothing is launched here, so neither a GPU nor the interpreter is needed.
"""

import itertools
import json
import warnings

import pytest
import torch

pytest.importorskip("triton")

from emoe_kernels.experts import triton_configs as configs
from emoe_kernels.experts import triton_host as host
from emoe_kernels.experts.triton_report import launches


def test_launching_reads_nothing_from_the_device():
    """On meta tensors a read of a value raises: forward, backward and the plan are launched without one."""
    assert len(launches("sm80", torch.bfloat16)) > 10


def test_block_height_follows_the_rows_of_an_expert():
    heights = {n: configs.rows_per_block(n * 64, 64) for n in (0, 1, 16, 17, 60, 128, 4000)}
    assert heights == {0: 16, 1: 16, 16: 16, 17: 32, 60: 64, 128: 128, 4000: 128}


def test_the_grid_holds_every_block_and_no_more_than_needed():
    """At most as many blocks as the worst split of P pairs over E experts makes; that many are launched."""
    BM = 3
    for P, E in itertools.product(range(9), (1, 2, 3)):
        splits = (c for c in itertools.product(range(P + 1), repeat=E) if sum(c) == P)
        worst = max(sum(-(-count // BM) for count in split) for split in splits)
        assert worst <= host._blocks(P, E, BM) <= worst + 1


def test_tf32_only_where_torch_allows_it():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        kinds = []
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            kinds += [configs.arithmetic(torch.float32), configs.arithmetic(torch.float16)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert kinds == ["ieee", "half", "tf32", "half"]


def test_amd_has_no_tf32(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert configs.arithmetic(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert configs.arithmetic(torch.bfloat16) == "half"
    assert configs.architecture.__wrapped__(torch.device("cuda", 0)) == "sm80"


@pytest.mark.parametrize(
    "capability, row",
    [((8, 6), "sm80"), ((9, 0), "sm90"), ((10, 3), "sm90"), ((12, 0), "sm80")],  # 12.0: RTX 50, 99 KiB shared
    ids=str,
)
def test_the_row_of_the_table_has_no_more_shared_memory_than_the_gpu(capability, row, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture.__wrapped__(torch.device("cuda", 0)) == row


def test_the_number_of_tokens_changes_little_that_is_compiled_for():
    """32 blocks of 128 columns: all, or a power of two that fits into the buffer."""
    widths = {pairs: host._chunk(2 * pairs, 32, 128) for pairs in range(1, 200_000, 7)}
    assert set(widths.values()) == {128 << i for i in range(6)}
    assert all(width == 128 or 2 * pairs * width <= host.PART_BYTES for pairs, width in widths.items())
    assert host._chunk(2, 43, 128) == 43 * 128  # 5504 columns are not rounded up to 8192


def case(S=88, layout="rows", device="A100"):
    return configs.Case(device, "half", "hidden", 64, S, 2048, layout)


@pytest.mark.filterwarnings("ignore:.*No such file")
def test_own_measurements_go_before_the_table(own_file):
    table = configs.choose("sm80", case())
    configs.save({str(case()): configs.Config(64, 32, 32, 2, 2)})
    assert configs.choose("sm80", case()) == (64, 32, 32, 2, 2)
    for other in (case(S=96), case(layout="columns"), case(device="RTX 3060")):  # nothing was measured for these
        assert configs.choose("sm80", other) == table


BROKEN = [
    (None, "No such file"),  # a slip in the variable
    ("not json", "Expecting value"),
    ("[]", "no attribute"),
    ({str(case()): [64, 32, 32, 2]}, "missing 1 required"),
    ({str(case()): [64, 48, 32, 2, 2]}, "hidden.* not of powers of two"),
    ({str(case()): [64, 8, 32, 2, 2]}, "not of powers of two from 16 up"),
    ({str(case()): [64, "32", 32, 2, 2]}, "not of powers of two"),
    ({str(case()): [64, 32, 32, 3, 2]}, "warps=3"),
    ({str(case()): [64, 32, 32, 4, 9]}, "stages=9"),
]


@pytest.mark.parametrize("content, message", BROKEN, ids=[m for _, m in BROKEN])
def test_a_broken_file_costs_speed_and_a_warning(content, message, own_file):
    if content is not None:
        own_file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match=f"EMOE_TRITON_CONFIGS.*{message}"):
        config = configs.choose("sm80", case())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.choose("sm80", case()) == config  # said once


def test_no_file_is_no_mistake(tmp_path, monkeypatch, recwarn):
    monkeypatch.delenv(configs.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.user_configs.__wrapped__() == {}
    assert not recwarn
