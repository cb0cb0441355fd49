"""What the Triton ops share: the plan as an op, checks of arguments, helpers of their backward passes.

Legend: N tokens, K slots per token, E experts, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from .triton_launch import check_device
from .triton_plan import Plan, make_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the tokens and of everything except ids and routing weights."""


@custom_op("emoe_kernels::triton_plan", mutates_args=())
def _plan(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    check_device(experts_NK.device)
    if experts_NK.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts_NK has dtype {experts_NK.dtype}; expected torch.int64 or torch.int32")
    return tuple(make_plan(experts_NK, num_experts))


@_plan.register_fake
def _(experts_NK, num_experts):
    offsets_E1 = experts_NK.new_empty(num_experts + 1, dtype=torch.int32)
    return offsets_E1, experts_NK.new_empty(experts_NK.numel(), dtype=torch.int32)


def plan_experts(experts_NK: Tensor, num_experts: int) -> Plan:
    """The routing plan. `expert_linear` and `expert_combine` of one layer can share it: sorting once is enough."""
    return Plan(*_plan(experts_NK, num_experts))


def spread(grads: list[Tensor], need: list[bool]) -> list[Tensor | None]:
    """The gradients in their places, None where none was needed."""
    grads = iter(grads)
    return [next(grads) if wanted else None for wanted in need]


def sum_rows(dy_ND: Tensor, needed: bool) -> Tensor | None:
    """Gradient of a bias that every row has."""
    return dy_ND.sum(0, dtype=torch.float32).to(dy_ND.dtype) if needed else None


def check(
    x: Tensor, experts_NK: Tensor, plan: Plan, num_experts: int, weights_NK: Tensor | None = None, **expected
) -> None:
    """ValueError for shapes and dtypes with which a kernel would read past the end or read garbage.

    Called inside the ops of the forward passes, which anybody may call. Everything else about arguments is checked by
    the public functions (`emoe_kernels.experts.op`). `expected` holds (tensor or None, shape) by name.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; the Triton kernels take fp32, bf16 and fp16")
    if weights_NK is not None and not weights_NK.is_floating_point():
        raise ValueError(f"weights_NK has dtype {weights_NK.dtype}; expected a floating dtype")
    P = experts_NK.numel()
    shapes = (tuple(plan.offsets_E1.shape), tuple(plan.slots_P.shape))
    if shapes != ((num_experts + 1,), (P,)):
        raise ValueError(f"the plan has shapes {shapes}; for E={num_experts} and {P} slots it is (E + 1,), (slots,)")
    any_dtype = {
        "experts_NK": (experts_NK, (x.shape[0], experts_NK.shape[-1])),
        "weights_NK": (weights_NK, tuple(experts_NK.shape)),
        "offsets_E1": (plan.offsets_E1, (num_experts + 1,)),
        "slots_P": (plan.slots_P, (P,)),
    }
    for name, (tensor, shape) in (expected | any_dtype).items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if name not in any_dtype and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, x has {x.dtype}; cast one of them")
