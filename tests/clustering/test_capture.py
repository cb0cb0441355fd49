"""Refinement moves neurons to where a gate finds their energy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emoe.clustering.capture import refine_by_capture
from emoe.errors import UserError

TOKENS, WIDTH, EXPERTS, SIZE = 2048, 16, 6, 8
NEURONS = EXPERTS * SIZE


@pytest.fixture(scope="module")
def planted():
    """Neurons of group g take their energy where direction g of the input is large: (x, shares, true group)."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(TOKENS, WIDTH, generator=generator)
    group_F = torch.randperm(NEURONS, generator=generator) % EXPERTS
    energy_NF = (2 * x_ND[:, group_F]).exp() * torch.rand(TOKENS, NEURONS, generator=generator)
    return x_ND, energy_NF / energy_NF.sum(1, keepdim=True), group_F.numpy()


def in_batches(x_ND, share_NF, size: int = 512):
    return lambda: ((i, x_ND[s], share_NF[s]) for i, s in enumerate(slice(k, k + size) for k in range(0, TOKENS, size)))


def agreement(labels_F, group_F) -> float:
    """Share of pairs of neurons on which two partitions agree that they belong together."""
    same, truth = labels_F[:, None] == labels_F, group_F[:, None] == group_F
    return (same & truth).sum() / truth.sum()


def test_it_finds_the_planted_groups_from_a_half_wrong_start(planted):
    x_ND, share_NF, group_F = planted
    start_F = group_F.copy()
    wrong = np.random.RandomState(0).permutation(NEURONS)[: NEURONS // 2]
    start_F[wrong] = np.roll(start_F[wrong], 1)  # still equal parts
    assert agreement(start_F, group_F) < 0.6
    labels_F, held = refine_by_capture(in_batches(x_ND, share_NF), start_F, EXPERTS, rounds=10, width=WIDTH)
    assert agreement(labels_F, group_F) == 1
    assert labels_F.dtype == np.int32
    assert held[-1] > held[0] + 0.05


def test_parts_stay_equal_and_the_energy_held_rises(planted):
    x_ND, share_NF, _ = planted
    start_F = np.arange(NEURONS) % EXPERTS
    labels_F, held = refine_by_capture(in_batches(x_ND, share_NF), start_F, EXPERTS, rounds=3, width=WIDTH)
    assert np.bincount(labels_F).tolist() == [SIZE] * EXPERTS
    assert held == sorted(held)
    assert len(held) <= 4


def test_no_round_changes_nothing(planted):
    x_ND, share_NF, group_F = planted
    labels_F, held = refine_by_capture(in_batches(x_ND, share_NF), group_F, EXPERTS, rounds=0, width=WIDTH)
    assert (labels_F == group_F).all()
    assert len(held) == 1


def test_text_may_lie_in_several_places(planted):
    """Each process sums over its own batches; with the sums added up the result is that of one process."""
    x_ND, share_NF, _ = planted
    start_F = np.arange(NEURONS) % EXPERTS
    alone_F, held = refine_by_capture(in_batches(x_ND, share_NF), start_F, EXPERTS, rounds=4, width=WIDTH)

    import threading

    barrier, shelf, results = threading.Barrier(2), [None, None], [None, None]

    def process(rank: int) -> None:
        def total(*tensors):
            for tensor in tensors:
                shelf[rank] = tensor.clone()
                barrier.wait()
                summed = shelf[0] + shelf[1]
                barrier.wait()
                tensor.copy_(summed)

        mine = lambda: (b for b in in_batches(x_ND, share_NF)() if b[0] % 2 == rank)  # noqa: E731
        results[rank] = refine_by_capture(mine, start_F, EXPERTS, rounds=4, width=WIDTH, total=total)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for labels_F, found in results:
        assert (labels_F == alone_F).all()
        assert found == pytest.approx(held, abs=1e-5)


def test_a_feature_that_drowns_the_others_in_rounding(planted):
    x_ND, share_NF, group_F = planted
    huge_ND = x_ND.clone()
    huge_ND[:, 1:] = 1e-4 * x_ND[:, 1:] + 3e4 * x_ND[:, :1]  # as wide as fp32 holds, and all but one direction alike
    labels_F, held = refine_by_capture(in_batches(huge_ND, share_NF), group_F, EXPERTS, rounds=2, width=WIDTH)
    assert np.bincount(labels_F).tolist() == [SIZE] * EXPERTS
    assert np.isfinite(held).all()


def test_inputs_that_are_no_numbers_are_refused(planted):
    x_ND, share_NF, group_F = planted
    broken_ND = x_ND.clone()
    broken_ND[5, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        refine_by_capture(in_batches(broken_ND, share_NF), group_F, EXPERTS, rounds=1, width=WIDTH)
