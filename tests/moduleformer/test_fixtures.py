"""Every recorded number of an independent implementation, for two tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import emoe

FOLDER = Path(__file__).parents[1] / "fixtures" / "moduleformer"
NAMES = ("kvproj_mi", "linear_gate")
IMPLEMENTATIONS = ("reference", "portable", "auto")


@pytest.fixture(params=NAMES)
def recorded(request):
    """The numbers, and the settings of the model that they are of."""
    settings = json.loads((FOLDER / f"{request.param}.json").read_text())["config"]
    return load_file(FOLDER / f"{request.param}.safetensors"), settings


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def kernels(request):
    import emoe_kernels

    with emoe_kernels.use(request.param):
        yield


def part(numbers: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def load(recorded):
    numbers, settings = recorded
    model = emoe.ModuleFormerForCausalLM(emoe.ModuleFormerConfig(**settings)).eval()
    model.load_state_dict(part(numbers, "state_dict/"))
    return model, numbers


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@torch.no_grad()
def test_forward(recorded):
    model, numbers = load(recorded)
    out = model(
        numbers["input_ids"],
        use_cache=True,
        output_attentions=True,
        output_hidden_states=True,
        output_router_logits=True,
    )
    close(out.logits, numbers["eval/logits"])
    close(out.aux_loss, numbers["eval/aux_loss"], 1e-6)
    for kind, found in (("hidden_states", out.hidden_states), ("attentions", out.attentions)):
        wanted = part(numbers, f"eval/{kind}/")
        assert len(found) == len(wanted)
        for index, tensor in enumerate(found):
            close(tensor, wanted[str(index)])
    for index, layer in enumerate(out.past_key_values.layers):
        for which, states in enumerate((layer.keys, layer.values)):
            close(states.transpose(1, 2).flatten(2), numbers[f"eval/past_key_values/{index}/{which}"])
    assert len(out.routing) == len(out.router_logits) == 2 * model.config.n_layer
    for index, routing in enumerate(out.routing):
        wanted = part(numbers, f"eval/routing/{index}/")
        assert torch.equal(routing.experts_NK, wanted["indices"])
        close(routing.weights_NK, wanted["gates"])
        close(routing.probabilities(), wanted["probs"])
        close(model.transformer._aux_loss([routing], None), wanted["aux"], 1e-6)


@torch.no_grad()
def test_left_padding(recorded):
    model, numbers = load(recorded)
    mask_BT = numbers["left_pad_mask"]
    out = model(numbers["input_ids"], attention_mask=mask_BT)
    close(out.logits, numbers["eval_left_pad/logits"])
    routing = model(numbers["input_ids"], attention_mask=mask_BT, output_router_logits=True).routing
    # The recorded loss counts padding as tokens, as the released code does. Ours does not.
    close(model.transformer._aux_loss(list(routing), None), numbers["eval_left_pad/aux_loss"], 1e-6)
    close(model.transformer._aux_loss(list(routing), mask_BT.flatten()), out.aux_loss, 1e-6)
    assert abs(out.aux_loss - numbers["eval_left_pad/aux_loss"]) > 1e-3


@torch.no_grad()
def test_incremental_decoding(recorded):
    model, numbers = load(recorded)
    cache, logits = None, []
    for token_B1 in numbers["input_ids"].split(1, dim=1):
        out = model(token_B1, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, 1), numbers["incremental_logits"])
    close(torch.cat(logits, 1), numbers["eval/logits"])


def test_greedy_tokens(recorded):
    model, numbers = load(recorded)
    wanted = numbers["greedy"]
    prompt = wanted[:, :5]
    found = model.generate(prompt, max_new_tokens=wanted.shape[1] - 5, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


def test_training(recorded):
    model, numbers = load(recorded)
    model.train()
    out = model(numbers["input_ids"], labels=numbers["labels"])
    close(out.loss, numbers["train/loss"])
    close(out.aux_loss, numbers["train/aux_loss"], 1e-6)
    close(out.loss - model.config.aux_loss_weight * out.aux_loss, numbers["train/ce"])
    out.loss.backward()
    wanted = part(numbers, "train/grads/")
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        close(gradient, wanted[name], 1e-5 * wanted[name].abs().max().item())


@torch.no_grad()
def test_sequence_classification(recorded):
    numbers, settings = recorded
    config = emoe.ModuleFormerConfig(**settings, num_labels=3)
    model = emoe.ModuleFormerForSequenceClassification(config).eval()
    state = {k: v for k, v in part(numbers, "state_dict/").items() if k != "lm_head.weight"}
    model.load_state_dict({**state, "score.weight": numbers["seqcls/score_weight"]})
    close(model(numbers["seqcls/input_ids"]).logits, numbers["seqcls/logits"])
