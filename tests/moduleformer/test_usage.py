"""What is counted of gates, and the divergence of loads between domains."""

from __future__ import annotations

import math

import pytest
import torch

from emoe.gating.losses import entropies
from emoe.moduleformer.usage import GateUsage, domain_divergence


@torch.no_grad()
def test_usage_of_several_batches(tiny, ids):
    """Loads and entropies of two batches as of one; only the mode asked for counts; taking starts anew."""
    model = tiny()
    usage = GateUsage(model)
    for row in ids:
        model(row[None])
    model.train()(ids)
    rows = usage.take()
    routing = model.eval()(ids, output_router_logits=True).routing
    usage.take()
    assert usage.take() == []
    assert [(row["layer"], row["part"]) for row in rows] == [(i, p) for i in range(2) for p in ("attention", "ffn")]
    for row, choice in zip(rows, routing, strict=True):
        found = entropies(choice.probabilities())
        assert row["marginal"] == pytest.approx(found.marginal.item(), abs=1e-5)
        assert row["conditional"] == pytest.approx(found.conditional.item(), abs=1e-5)
        counts = torch.bincount(choice.experts_NK.flatten(), minlength=len(row["load"]))
        assert row["load"] == pytest.approx((counts / counts.sum()).tolist())
        assert row["probability"] == pytest.approx(choice.probabilities().mean(0).tolist(), abs=1e-6)
    usage.close()
    model(ids)
    assert usage.take() == []


@torch.no_grad()
def test_a_process_without_text_takes_part_in_every_sum(tiny, ids):
    """A domain may have fewer batches than there are processes; one that reduced less would wait for the others."""
    model, sent = tiny(), []
    busy = GateUsage(model)
    model(ids)
    wanted = busy.take(lambda sums: sent.append(sums.clone()))
    busy.close()
    idle = GateUsage(model)
    assert idle.take(lambda sums: sums.add_(sent.pop(0))) == wanted
    assert not sent


def test_divergence():
    even, one = [{"load": [0.5, 0.5]}], [{"load": [0.25, 0.75]}]
    found = domain_divergence({"a": even, "b": one})
    assert found[0, 0] == found[1, 1] == 0
    assert found[0, 1].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found[1, 0].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    near = {"a": [{"probability": [0.5, 0.5]}], "b": [{"probability": [0.51, 0.49]}]}
    assert 0 < domain_divergence(near, "probability")[0, 1] < 1e-3
    assert domain_divergence({"a": [{"load": [1.0, 0.0]}], "b": [{"load": [0.0, 1.0]}]}).isfinite().all()
