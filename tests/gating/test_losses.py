"""Losses on routers against their formulas, and laws: padding, splits over processes, underflow."""

from __future__ import annotations

import math

import pytest
import torch

from emoe.gating.losses import entropies, load_concentration, mutual_information, new_router_penalty, switch, z_loss


def batch(tokens: int = 12, experts: int = 5, chosen: int = 2, seed: int = 0):
    """Logits (a leaf), the experts chosen, and a mask that leaves some tokens out; float64 where it is compared."""
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(tokens, experts, generator=generator).mul(2).requires_grad_()
    mask_N = torch.rand(tokens, generator=generator) > 0.3
    return logits_NE, logits_NE.topk(chosen).indices, mask_N


LOSSES = {
    "mutual_information": lambda logits, experts, mask: mutual_information(logits.softmax(-1), mask),
    "weighted": lambda logits, experts, mask: mutual_information(
        logits.softmax(-1), mask, marginal_weight=0.5, conditional_weight=2.0
    ),
    "load_concentration": lambda logits, experts, mask: load_concentration(logits.softmax(-1), mask),
    "switch": lambda logits, experts, mask: switch(logits.softmax(-1), experts, mask),
    "z_loss": lambda logits, experts, mask: z_loss(logits, mask),
}


def by_hand(name: str, logits_NE: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
    """The formulas, token by token, in float64."""
    p_NE = logits_NE.double().softmax(-1)
    mean_E = sum(p_NE) / len(p_NE)
    marginal = -sum(p * p.log() for p in mean_E)
    conditional = sum(-sum(p * p.log() for p in row) for row in p_NE) / len(p_NE)
    if name == "mutual_information":
        return -marginal + conditional
    if name == "weighted":
        return -0.5 * marginal + 2.0 * conditional
    if name == "load_concentration":
        return marginal
    if name == "switch":
        counts_E = torch.stack([(experts_NK == e).sum() for e in range(p_NE.shape[1])]).double()
        return p_NE.shape[1] * sum(f / counts_E.sum() * p for f, p in zip(counts_E, mean_E, strict=True))
    return sum(row.exp().sum().log() ** 2 for row in logits_NE.double()) / len(logits_NE)


@pytest.mark.parametrize("name", LOSSES)
def test_formula_and_gradient(name):
    logits_NE, experts_NK, mask_N = batch()
    found = LOSSES[name](logits_NE, experts_NK, mask_N)
    (gradient_NE,) = torch.autograd.grad(found, logits_NE)
    wanted = by_hand(name, logits_NE[mask_N], experts_NK[mask_N])
    (wanted_NE,) = torch.autograd.grad(wanted, logits_NE)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    torch.testing.assert_close(gradient_NE, wanted_NE, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_may_hold_anything(name):
    """Not even NaN in a token that is left out reaches the loss or the other tokens' gradients."""
    logits_NE, experts_NK, mask_N = batch()
    clean = LOSSES[name](logits_NE[mask_N], experts_NK[mask_N], None)
    (clean_NE,) = torch.autograd.grad(clean, logits_NE)
    dirty_NE = logits_NE.detach().masked_fill(~mask_N[:, None], torch.nan).requires_grad_()
    found = LOSSES[name](dirty_NE, experts_NK, mask_N)
    (gradient_NE,) = torch.autograd.grad(found, dirty_NE)
    assert found.item() == pytest.approx(clean.item(), abs=1e-6)
    torch.testing.assert_close(gradient_NE[mask_N], clean_NE[mask_N], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(name):
    logits_NE, experts_NK, mask_N = batch()
    found = LOSSES[name](logits_NE, experts_NK, torch.zeros_like(mask_N))
    assert found.item() == 0
    assert torch.autograd.grad(found, logits_NE)[0].isfinite().all()


def test_underflowed_probabilities_have_a_gradient():
    logits_NE = torch.tensor([[0.0, 500.0], [500.0, 0.0]], requires_grad=True)
    loss = mutual_information(logits_NE.softmax(-1))
    assert loss.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert torch.autograd.grad(loss, logits_NE)[0].isfinite().all()


def test_extremes():
    """Balanced and certain: I = log E. Indifferent: I = 0, switch 1. One expert for all: no entropy, switch E."""
    certain = torch.eye(4).repeat(3, 1)
    assert mutual_information(certain).item() == pytest.approx(-math.log(4), abs=1e-6)
    even = torch.full((8, 4), 0.25)
    assert mutual_information(even).item() == pytest.approx(0, abs=1e-6)
    assert switch(even, torch.arange(8)[:, None] % 4).item() == pytest.approx(1)
    one = torch.eye(4)[:1].repeat(6, 1)
    assert entropies(one).marginal.item() == pytest.approx(0, abs=1e-6)
    assert switch(one, torch.zeros(6, 1, dtype=torch.int64)).item() == pytest.approx(4)


def test_unused_slots_are_no_choice():
    p_NE = torch.rand(6, 3).softmax(-1)
    experts_NK = torch.tensor([[0, -1], [1, -1], [2, -1], [0, -1], [1, -1], [2, -1]])
    assert switch(p_NE, experts_NK).item() == pytest.approx(switch(p_NE, experts_NK[:, :1]).item())


def test_router_penalty():
    rows = [torch.ones(2, 3, requires_grad=True), torch.full((1, 3), 2.0)]
    assert new_router_penalty(rows).item() == 6 + 12
    assert new_router_penalty(rows, [torch.zeros(2, 3), torch.ones(1, 3)]).item() == 6 + 3
    with pytest.raises(ValueError, match="empty"):
        new_router_penalty([])


def _worker(rank: int, port: int, folder: str) -> None:
    """Five and seven tokens of the same twelve: the mean of the two means would be wrong."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for name, loss in LOSSES.items():
        logits_NE, experts_NK, mask_N = batch()
        mine = slice(0, 5) if rank == 0 else slice(5, None)
        scale = torch.ones((), requires_grad=True)  # stands for a weight that both processes hold
        value = loss(logits_NE[mine] * scale, experts_NK[mine], mask_N[mine])
        value.backward()
        torch.distributed.all_reduce(scale.grad)
        gradient_NE = logits_NE.grad.clone()
        torch.distributed.all_reduce(gradient_NE)
        results[name] = (value.detach(), gradient_NE / 2, scale.grad / 2)  # averaged, as DDP does
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path, free_port):
    torch.multiprocessing.spawn(_worker, (free_port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, loss in LOSSES.items():
        logits_NE, experts_NK, mask_N = batch()
        scale = torch.ones((), requires_grad=True)
        value = loss(logits_NE * scale, experts_NK, mask_N)
        value.backward()
        for results in found:
            torch.testing.assert_close(results[name][0], value.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(results[name][1], logits_NE.grad, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(results[name][2], scale.grad, rtol=1e-5, atol=1e-6)
