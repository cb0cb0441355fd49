"""Gates: what each fits, and laws of routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routers import D, F, sparse_mlp

from emoe.errors import UserError
from emoe.gating import NAMES, get, tables_of
from emoe.gating.energies import ExpertEnergies, log_energies

routings = st.tuples(
    st.sampled_from(NAMES), st.sampled_from([2, 3, 4, 6, 8, 12, 24]), st.integers(1, 24), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(routings, st.integers(0, 9))
def test_routing_laws(shape, tokens):
    """K distinct experts a token, those of largest logit; each token for itself, whatever stands around it."""
    gate, experts, top_k, seed = shape
    top_k = min(top_k, experts)
    ffn = sparse_mlp(gate, experts, top_k, seed)
    x_ND = torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))
    routing = ffn.router(x_ND, ffn)
    assert routing.experts_NK.shape == (tokens, top_k)
    assert routing.logits_NE.dtype == torch.float32
    assert all(len(set(row)) == top_k for row in routing.experts_NK.tolist())
    chosen_NE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, routing.experts_NK, True)
    if tokens and top_k < experts:
        worst = routing.logits_NE.masked_fill(~chosen_NE, torch.inf).amin(1)
        assert (worst >= routing.logits_NE.masked_fill(chosen_NE, -torch.inf).amax(1)).all()
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ffn.router(x_ND[order], ffn).logits_NE, routing.logits_NE[order], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_permuting_experts_permutes_the_routing(experts, seed):
    """Average-key: blocks moved about in the weights are the same experts under other numbers."""
    ffn, moved = (sparse_mlp("average-key", experts, 1, seed) for _ in range(2))
    order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    rows_F = torch.arange(F).view(experts, -1)[order_E].flatten()
    with torch.no_grad():
        moved.gate_proj.weight.copy_(ffn.gate_proj.weight[rows_F])
    x_ND = torch.randn(5, D, generator=torch.Generator().manual_seed(seed))
    before, after = ffn.router(x_ND, ffn).logits_NE, moved.router(x_ND, moved).logits_NE
    torch.testing.assert_close(after, before[:, order_E])


def test_average_key_follows_the_weights():
    """No task gradient reaches it, but every change of the weights does."""
    ffn = sparse_mlp("average-key", 4, 2)
    x_ND = torch.randn(3, D)
    before = ffn.router(x_ND, ffn).logits_NE
    with torch.no_grad():
        ffn.gate_proj.weight.mul_(2.0)
    torch.testing.assert_close(ffn.router(x_ND, ffn).logits_NE, 2 * before)
    assert not ffn.router(x_ND, ffn).logits_NE.requires_grad


def test_average_key_is_the_mean_pre_activation():
    ffn = sparse_mlp("average-key", 4, 2)
    x_ND = torch.randn(7, D)
    expected = ffn.gate_proj(x_ND).unflatten(1, (4, -1)).mean(-1)
    torch.testing.assert_close(ffn.router(x_ND, ffn).logits_NE, expected, rtol=1e-5, atol=1e-6)


def fitted(name: str, x_ND, h_NF, experts: int):
    fit = get(name).fit(experts, 1, x_ND.shape[1], h_NF.shape[1])
    for part in range(4):
        piece = slice(part * len(x_ND) // 4, (part + 1) * len(x_ND) // 4)
        fit.update(x_ND[piece], h_NF[piece], energies(h_NF[piece], experts), torch.ones(len(x_ND[piece])))
    return fit.finish()


@pytest.mark.parametrize("name", [*NAMES, "cosine"])
def test_a_gate_names_its_tables(name):
    """Those that its fit gives and its router keeps; without any there is nothing to learn."""
    router = sparse_mlp(name, 4, 2).router
    assert set(tables_of(name)) == set(dict(router.named_buffers()))
    if tables_of(name):
        assert set(fitted(name, torch.randn(64, D), torch.rand(64, F), 4)) == set(tables_of(name))
        router.learn()
        assert list(router.parameters())
    else:
        with pytest.raises(ValueError, match="has no table to learn"):
            router.learn()


def energies(h_NF, experts: int):
    """Energies of experts whose neurons write to orthogonal directions: sums of squares."""
    return ExpertEnergies(torch.eye(h_NF.shape[1]), experts)(h_NF)


def test_discriminant_is_ridge_regression():
    """The streamed normal equations give what a direct solve over all tokens gives."""
    from emoe.gating import discriminant

    generator = torch.Generator().manual_seed(0)
    x_ND, h_NF = torch.randn(512, D, generator=generator) + 0.3, torch.randn(512, F, generator=generator)
    table = fitted("discriminant", x_ND, h_NF, 4)
    target = log_energies(energies(h_NF, 4)).double()
    x, t = x_ND.double() - x_ND.double().mean(0), target - target.mean(0)
    covariance = x.T @ x / 512
    ridge = discriminant.RIDGE * covariance.diagonal().mean()
    weight = torch.linalg.solve(covariance + ridge * torch.eye(D, dtype=torch.float64), x.T @ t / 512)
    torch.testing.assert_close(table["weight"].double(), weight.T, rtol=1e-4, atol=1e-5)
    direct = target.mean(0) - x_ND.double().mean(0) @ weight
    torch.testing.assert_close(table["bias"].double(), direct, rtol=1e-4, atol=1e-4)


def test_discriminant_finds_the_expert_of_planted_directions():
    """Expert e answers to direction e: the gate must say so for nearly every token."""
    generator = torch.Generator().manual_seed(0)
    expert_N = torch.randint(4, (2000,), generator=generator)
    x_ND = torch.randn(2000, D, generator=generator)
    x_ND[torch.arange(2000), expert_N] += 6
    h_NF = 0.1 * torch.rand(2000, F, generator=generator)
    h_NF.unflatten(1, (4, -1))[torch.arange(2000), expert_N] += 1
    table = fitted("discriminant", x_ND, h_NF, 4)
    picked = (x_ND @ table["weight"].T + table["bias"]).argmax(1)
    assert (picked == expert_N).float().mean() > 0.97


def test_representative_is_the_telling_neuron():
    """In each expert one neuron follows the energy, the others are noise: that one is found."""
    generator = torch.Generator().manual_seed(0)
    h_NF = 0.3 * torch.randn(3000, F, generator=generator)
    telling = [2, 6 + 5, 12 + 0, 18 + 3]
    h_NF[:, telling] = 3 * torch.randn(3000, 4, generator=generator)
    table = fitted("representative", torch.randn(3000, D, generator=generator), h_NF, 4)
    assert table["neuron"].tolist() == telling
    assert (table["scale"] > 0).all()


def test_energies_are_the_squared_lengths_of_what_experts_add():
    """Cross terms included: neurons of one expert that write to one direction add up or cancel."""
    generator = torch.Generator().manual_seed(0)
    down_DF, h_NF = torch.randn(D, F, generator=generator), torch.randn(7, F, generator=generator)
    found_NE = ExpertEnergies(down_DF, 4)(h_NF)
    for e, part in enumerate(torch.arange(F).view(4, -1)):
        torch.testing.assert_close(found_NE[:, e], (h_NF[:, part] @ down_DF[:, part].T).square().sum(1))


def test_a_token_of_great_norm_wants_less():
    """The same energies weigh less against a longer residual stream: that is what a threshold compares."""
    x_ND, h_NF = torch.randn(64, D), torch.rand(64, F)
    biases = []
    for scale in (1.0, 100.0):
        fit = get("discriminant").fit(4, 1, D, F)
        fit.update(x_ND, h_NF, energies(h_NF, 4), torch.full((64,), scale))
        biases.append(fit.finish()["bias"])
    torch.testing.assert_close(biases[0] - biases[1], torch.full((4,), torch.tensor(100.0).log()))


def test_unknown_gates_are_named():
    with pytest.raises(UserError, match=r"unknown gate 'discrimnant' \(did you mean 'discriminant'\?\)"):
        get("discrimnant")
