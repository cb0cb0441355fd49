"""The model against its equations in slow loops: every gate, loss, activation, and shape of attention."""

from __future__ import annotations

import pytest
import torch
from support.slow_moduleformer import SlowModuleFormer

CASES = {
    "mlp, mi": {},
    "linear, switch": {"gate_type": "linear", "aux_loss_type": "switch"},
    "gmm, switch": {"gate_type": "gmm", "aux_loss_type": "switch"},
    "gmm, mi, one layer": {"gate_type": "gmm", "n_layer": 1},
    "identity keys and values": {"att_hidden": 12, "n_head": 1},  # as in the published models
    "k = 4, silu": {"k_att": 4, "n_att_experts": 6, "k_mlp": 4, "activation_function": "silu"},  # the 700M-4B's K
    "all experts chosen": {"k_att": 4, "k_mlp": 5},
    "one expert": {"k_att": 1, "k_mlp": 1, "gate_type": "linear"},
    "an activation without a kernel": {"activation_function": "mish"},
    "as wide as the model, but two heads": {"att_hidden": 12},  # not the identity
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_gradients(tiny, ids, case):
    model = tiny(**CASES[case]).train()
    slow = SlowModuleFormer(model.config, model.state_dict())
    out = model(ids, labels=ids)
    loss, aux = slow.loss(ids.tolist())
    torch.testing.assert_close(out.logits[0].double(), slow.logits(ids[0].tolist())[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.aux_loss.double(), aux, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        wanted = slow.w[name].grad
        scale = wanted.abs().max().item()
        assert scale > 0 or "experts" in name, f"{name} does not matter in this case, which then tests nothing of it"
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_gate_all_is_a_dense_model(tiny, ids):
    """Every expert with weight 1: the stacked experts as one wide layer."""
    model = tiny(gate_type="all", k_att=4, k_mlp=5)
    assert not any("gate" in name for name, _ in model.named_parameters())
    ffn = model.transformer.h[0].mlpf
    x_ND = torch.randn(6, 12)
    wide_in = ffn.experts.weight.transpose(0, 1).flatten(1)
    wanted = torch.nn.functional.gelu(x_ND @ wide_in, approximate="tanh") @ ffn.output_experts.weight.flatten(0, 1)
    torch.testing.assert_close(ffn(x_ND)[0], wanted, rtol=1e-5, atol=1e-6)
    assert model(ids).aux_loss is None
    with pytest.raises(ValueError, match="k_mlp=5, not 2"):
        tiny(gate_type="all", k_att=4, k_mlp=2)


def test_rotary_attention(tiny, ids):
    """Softmax over rotated keys, by complex numbers; only distances count, so left padding changes nothing."""
    model = tiny(attention_type="rotary", att_hidden=8, n_head=2)
    block = model.transformer.h[0].attn
    x_BTD = torch.randn(1, 5, 12)
    y_BTD, routing, weights = block(x_BTD, None, None, True)
    turn_T2 = torch.polar(torch.ones(5, 2), torch.arange(5.0)[:, None] * 10000 ** (-torch.arange(0, 4, 2) / 4))
    k_TGa = block.k_proj(x_BTD)[0].unflatten(1, (2, 4))
    for t in range(5):
        for slot, expert in enumerate(routing.experts_NK[t].tolist()):
            q_Ga = (x_BTD[0, t] @ block.q_proj.experts.weight[expert]).unflatten(0, (2, 4))
            for g in range(2):
                pairs = lambda v: torch.complex(v[..., :2], v[..., 2:])  # noqa: E731
                logits = [
                    (pairs(q_Ga[g]) * turn_T2[t] * (pairs(k_TGa[j, g]) * turn_T2[j]).conj()).sum().real / 2
                    for j in range(t + 1)
                ]
                found = weights[0, slot, g, t]
                torch.testing.assert_close(found[: t + 1], torch.stack(logits).softmax(0), rtol=1e-4, atol=1e-5)
                assert not found[t + 1 :].any()
    torch.testing.assert_close(block(x_BTD, None, None, False)[0], y_BTD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["stick-breaking", "rotary"])
def test_left_padding_changes_nothing(tiny, ids, kind):
    model = tiny(attention_type=kind)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    found, wanted = model(padded, attention_mask=mask), model(ids)
    torch.testing.assert_close(found.logits[:, 4:], wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["stick-breaking", "rotary"])
@pytest.mark.parametrize("steps", [[1] * 7, [3, 4], [5, 1, 1]])
def test_cached_steps_equal_one_pass(tiny, ids, kind, steps):
    model = tiny(attention_type=kind)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model(ids, attention_mask=mask).logits
    cache, at, found = None, 0, []
    for step in steps:
        out = model(ids[:, at : at + step], attention_mask=mask[:, : at + step], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + step
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1)[mask == 1], wanted[mask == 1], rtol=1e-5, atol=1e-5)


def test_a_token_s_output_does_not_depend_on_its_batch(tiny, ids):
    model = tiny()
    both = model(ids).logits
    torch.testing.assert_close(model(ids[1:]).logits, both[1:], rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[0, -1] = 3 + (changed[0, -1] - 2) % 26
    torch.testing.assert_close(model(changed).logits[:, :-1], both[:, :-1], rtol=1e-5, atol=1e-5)


def test_drawn_experts(tiny):
    """sample_topk = 1 of K = 2: the first is the best, the second drawn by the others' probabilities, in training."""
    gate = tiny(sample_topk=1).transformer.h[0].mlpf.gate
    x_ND = torch.randn(1, 12).repeat(20_000, 1)
    with torch.no_grad():
        p_E = gate(x_ND[:1]).probabilities()[0]
        routing = gate.train()(x_ND)
        best = p_E.argmax()
        assert (routing.experts_NK[:, 0] == best).all()
        assert (routing.experts_NK[:, 1] != best).all()
        rest_E = p_E.clone()
        rest_E[best] = 0
        shares_E = torch.bincount(routing.experts_NK[:, 1], minlength=5) / 20_000
        torch.testing.assert_close(shares_E, rest_E / rest_E.sum(), rtol=0, atol=0.02)
        torch.testing.assert_close(routing.weights_NK[0], p_E[routing.experts_NK[0]])
        assert torch.equal(gate.eval()(x_ND[:1]).experts_NK[0], p_E.topk(2).indices)


def test_micro_batches_weigh_as_their_tokens(tiny, ids):
    """Two micro-batches told of the whole step: cross-entropy of the step, and the mean of their auxiliary losses."""
    model = tiny()
    items = torch.tensor(12)
    parts = [model(row[None], labels=row[None], num_items_in_batch=items) for row in ids]
    cross_entropy = model(ids, labels=ids)
    wanted = cross_entropy.loss - 0.1 * cross_entropy.aux_loss + 0.1 * sum(p.aux_loss for p in parts) / 2
    torch.testing.assert_close(sum(p.loss for p in parts), wanted)
