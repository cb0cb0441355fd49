"""What a fitted gate row does not depend on, and how large its logits are."""

from __future__ import annotations

import pytest
import torch

from emoe.gating.opening import Opening


def tokens(count: int, shift: float, seed: int) -> torch.Tensor:
    """Normal tokens (count, 5), the new ones `shift` apart along one direction and wider along another; then a 1."""
    x_NC = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    x_NC[:, 0] += shift
    x_NC[:, 1] *= 1 + shift
    x_NC[:, 2] += 0.4 * x_NC[:, 0]
    return torch.cat([x_NC, torch.ones(count, 1)], 1)


def fitted(shift: float, repeated: dict[bool, int]) -> tuple[torch.Tensor, float, float]:
    """From 2000 tokens of each text, each given so many times."""
    opening, texts = Opening(), {True: tokens(2000, shift, 0), False: tokens(2000, 0.0, 1)}
    for step in (opening.add, opening.score):
        for new, x_NC in texts.items():
            step(x_NC.repeat(repeated[new], 1), new)
        if step == opening.add:
            opening.solve()
    return opening.row(0.1)


@pytest.mark.parametrize("longer", [True, False])
def test_a_longer_text_weighs_no_more(longer):
    """Text that is repeated is the same text."""
    row_C, new, old = fitted(1.5, {True: 1, False: 1})
    again_C, *shares = fitted(1.5, {longer: 6, not longer: 1})
    torch.testing.assert_close(again_C, row_C, rtol=1e-3, atol=1e-3)
    assert shares == pytest.approx([new, old], abs=2e-3)


def test_texts_far_apart_are_six_apart():
    """Three for each, as the logits' unit says."""
    row_C, new, old = fitted(30.0, {True: 1, False: 1})
    means = {shift: (tokens(4000, shift, 9) @ row_C).mean().item() for shift in (30.0, 0.0)}
    assert new > 0.999
    assert old <= 0.1
    assert means[30.0] - means[0.0] == pytest.approx(6.0, rel=0.05)
