"""Losses on routers are the formulas that they are called by, summed over gates, and training lowers them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gates import gates_of

from emoe.finetuning.routing import auxiliary_loss, watched
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import RouterLosses, module_shares, train_only

FACTOR = 0.5


@pytest.fixture(params=["converted_llama", "tiny_moduleformer"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def entropies(p_NE: torch.Tensor) -> dict[str, float]:
    """H(m) and -I(m; x) = H(m|x) - H(m), in nats."""
    mean_E = p_NE.mean(0)
    marginal = -(mean_E * mean_E.log()).sum().item()
    return {"concentration": marginal, "mi": -(p_NE * p_NE.log()).sum(1).mean().item() - marginal}


def probabilities(model, into: list[torch.Tensor]) -> None:
    """Put what each gate says into the list, in fp64."""
    for gate in gates_of(model).values():
        gate.register_forward_hook(lambda g, i, routing: into.append(routing.logits_NE.detach().double().softmax(-1)))


def random_tokens() -> torch.Tensor:
    return torch.randint(5, 96, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("loss", ["mi", "concentration"])
def test_a_few_steps_lower_what_the_loss_is_called_by(loss, padded, folder):
    model, anatomy, said, values = load(folder), anatomy_of(folder), [], []
    train_only(model, anatomy, "router")
    losses = RouterLosses(model, anatomy, {loss: FACTOR}, "router")
    probabilities(model, said)
    mask_N = torch.arange(4 * 32) % 3 > 0 if padded else torch.ones(4 * 32, dtype=torch.bool)
    losses.mask_N = mask_N if padded else None
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    for _ in range(10):
        said.clear()
        model(random_tokens())
        found = losses.take()
        values.append(sum(entropies(p_NE[mask_N])[loss] for p_NE in said))
        assert found.item() == pytest.approx(FACTOR * values[-1], abs=1e-4)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.05 * len(said)


def weighed(logits_NE: torch.Tensor) -> torch.Tensor:
    """Weights of 8 modules in the budget and of added ones, made a distribution, in fp64."""
    logits_NE = logits_NE.detach().double()
    weights_NE = torch.cat([logits_NE[:, :8].softmax(-1), logits_NE[:, 8:].sigmoid()], 1)
    return weights_NE / weights_NE.sum(1, keepdim=True)


@pytest.mark.parametrize("loss", ["mi", "concentration"])
def test_added_modules_count_by_their_weights(loss, folder, run):
    """They are outside of the softmax of the old ones, and so they are in the losses."""
    big = run("extend", folder, "big", "--experts", 2)
    model, anatomy, said = load(big), anatomy_of(big), []
    train_only(model, anatomy, "new-modules")
    losses = RouterLosses(model, anatomy, {loss: FACTOR}, "new-modules")
    for name, gate in gates_of(model).items():
        if name.endswith("ffn"):
            gate.register_forward_hook(lambda g, i, routing: said.append(weighed(routing.logits_NE)))
        else:
            gate.register_forward_hook(lambda g, i, routing: said.append(routing.probabilities().detach().double()))
    model.train()
    with watched(model) as routings:
        model(random_tokens())
    values = [entropies(p_NE)[loss] for p_NE in said]
    found = losses.take()
    assert found.item() == pytest.approx(FACTOR * sum(values), abs=1e-4)
    found.backward()
    assert all(p.grad.abs().max() > 0 for p in anatomy.gate_parameters(model) if p.requires_grad)
    if routings:  # of a converted model, as `finetune` has them
        ours = auxiliary_loss({loss: FACTOR}, routings, torch.ones(4, 32))
        assert ours.item() == pytest.approx(FACTOR * sum(values) / len(values), abs=1e-5)


def test_shares_depend_on_what_the_model_does_alone():
    logits_NE = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    raised_NE = logits_NE + 7 * (torch.arange(6) < 4)
    for budgeted in (4, 6):
        shares_NE = module_shares(logits_NE, budgeted)
        torch.testing.assert_close(shares_NE.sum(1), torch.ones(5))
        same = torch.allclose(module_shares(raised_NE, budgeted), shares_NE)
        assert same == (budgeted == 4)
    torch.testing.assert_close(module_shares(logits_NE, 6), logits_NE.softmax(-1))


def new_gate_rows(folder: Path) -> dict[str, torch.Tensor]:
    """Of the two experts that were added to every layer's FFN."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    gates = ("mlp.router.weight", "mlp.router.bias", "mlpf.gate.w_gate.0.weight")
    return {name: tensor[8:] for name, tensor in tensors.items() if name.endswith(gates)}


def squares(rows: dict[str, torch.Tensor]) -> float:
    return sum(row.double().square().sum().item() for row in rows.values())


def test_new_rows_are_penalised_by_their_squares(folder, run):
    big = run("extend", folder, "big", "--experts", 2)
    model, anatomy = load(big), anatomy_of(big)
    train_only(model, anatomy, "new-modules")
    losses = RouterLosses(model, anatomy, {"router": FACTOR}, "new-modules")
    assert losses.take().item() == pytest.approx(FACTOR * squares(new_gate_rows(big)), rel=1e-5)


@pytest.mark.parametrize("what", ["router", "all"])
def test_old_rows_are_penalised_by_their_distance(what, folder):
    model, anatomy = load(folder), anatomy_of(folder)
    train_only(model, anatomy, what)
    losses = RouterLosses(model, anatomy, {"router": FACTOR}, what)
    assert losses.take().item() == 0
    tables = [p for gate in gates_of(model).values() for p in gate.parameters()]
    with torch.no_grad():
        for table in tables:
            table += 0.25
    assert losses.take().item() == pytest.approx(FACTOR * sum(t.numel() for t in tables) / 16, rel=1e-5)


def test_training_shrinks_penalised_rows(folder, run, text_file):
    big = run("extend", folder, "big", "--experts", 2)
    flags = ("--text", text_file, "--steps", 12, "--tokens-per-step", 128, "--sequence-length", 64)
    flags += ("--held-out-tokens", 128, "--learning-rate", 3e-2, "--precision", "float32", "--train", "new-modules")
    free = new_gate_rows(run("tune", big, "free", *flags))
    held = new_gate_rows(run("tune", big, "held", *flags, "--loss", "router=10"))
    assert free.keys() == held.keys() == new_gate_rows(big).keys()
    assert squares(held) < 0.7 * min(squares(free), squares(new_gate_rows(big)))
