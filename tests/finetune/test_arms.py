"""Arms differ in nothing but the method: same start, same data, and with all experts on the same arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import emoe
from emoe.errors import UserError
from emoe.finetuning import arms
from emoe.finetuning.model import build, load_tokenizer
from emoe.finetuning.routing import auxiliary_loss, watched
from emoe.finetuning.texts import texts_of
from emoe.finetuning.trainer import Tuner, Watch, make_tuner
from emoe.finetuning.tune import finetune
from emoe.modeling.routing_emoe import RULES, Router
from emoe.tasks import get
from emoe.tasks.data import load_task

E = 8
DENSE = [name for name, arm in arms.ARMS.items() if not arm.copied]


@pytest.fixture
def start(arm_settings):
    """Makes the model of an arm, with its texts and data."""

    def make(method: str, seed: int = 0, **changes):
        config = arm_settings(method=method, **changes)
        task = get(config.task)
        tokenizer = load_tokenizer(Path(config.model))
        found = build(config, arms.get(method), Path(config.model), task, tokenizer.pad_token_id, seed)
        return found.model.train(), texts_of(task, tokenizer, config.max_length), load_task(task), config

    return make


def stock_of(model) -> transformers.PreTrainedModel:
    """The stock class with the same weights in the same order."""
    config = transformers.LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if not k.startswith("emoe")})
    stock = transformers.LlamaForSequenceClassification(config)
    stock.load_state_dict({k: v.clone() for k, v in model.state_dict().items() if ".router." not in k})
    return stock


@pytest.mark.parametrize("method", arms.ARMS)
def test_loss_at_step_0_is_vanilla_s_when_all_experts_are_on(method, start):
    model, texts, data, _ = start(method, top_k=E, copies_top_k=4)
    batch = texts.collate(texts.encode(data.train[:8]))
    labels = batch.pop("labels")
    with torch.no_grad():
        ours = texts.loss_sum(model(**batch).logits, labels)[0]
        vanilla = texts.loss_sum(stock_of(start("vanilla")[0]).train()(**batch).logits, labels)[0]
    if method == "gmoe":  # copies are summed with weights that add up to 1
        torch.testing.assert_close(ours, vanilla)
    else:
        assert torch.equal(ours, vanilla)


def test_emoe_with_all_experts_trains_bit_for_bit_like_the_stock_class(start, tiny_llama, tmp_path):
    """Twenty steps of full tuning in fp32; vanilla is the same computation, hence a true stock fine-tuning, too.

    With the neurons in their original order sums are rounded otherwise, which is all the difference.
    """
    trained = {}
    for name in ("stock", "original", "emoe", "vanilla"):
        model, texts, data, config = start("vanilla" if name == "vanilla" else "emoe", top_k=E, max_steps=20)
        if name == "stock":
            model = stock_of(model)
        elif name == "original":
            head = model.score.weight.detach().clone()
            model = transformers.LlamaForSequenceClassification.from_pretrained(tiny_llama, dtype=torch.float32)
            model.score.weight.data = head
        watch = Watch(lambda *_: None, "")
        validation = (data.validation.examples, texts.encode(data.validation.examples))
        tuner = make_tuner(config, model, texts, texts.encode(data.train), validation, tmp_path / name, 0, 1, watch)
        tuner.probe = None
        tuner.train()
        trained[name] = model.eval()
    weights = {name: model.state_dict() for name, model in trained.items()}
    for name, weight in weights["stock"].items():
        assert torch.equal(weight, weights["emoe"][name]), name
        assert torch.equal(weight, weights["vanilla"][name]), name
    first = start("vanilla")[0].state_dict()
    moved = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(first[moved], weights["emoe"][moved])
    batch = texts.collate([row for row in validation[1] if row.pop("labels") >= 0])
    with torch.no_grad():
        logits = {name: model(**batch).logits for name, model in trained.items()}
    torch.testing.assert_close(logits["original"], logits["stock"], rtol=1e-3, atol=1e-3)


def test_every_arm_starts_with_the_same_weights_and_sees_the_same_batches(arm_settings, tmp_path, monkeypatch):
    seen, heads = {}, {}
    loss = Tuner.compute_loss

    def record(self, model, inputs, **keywords):
        if model.training:
            seen.setdefault(method, []).append(inputs["input_ids"].tolist())
            heads.setdefault(method, model.score.weight.detach().clone())
        return loss(self, model, inputs, **keywords)

    monkeypatch.setattr(Tuner, "compute_loss", record)
    for method in arms.ARMS:
        (result,) = finetune(arm_settings(method=method, max_steps=4, output=str(tmp_path / method)))
        assert result["steps"] == 4
        readings = set(result["readings"])
        assert readings == {"as-trained"} | ({"dense"} if arms.get(method).sparse else {"emoe"}) - (
            {"dense"} if method == "gmoe" else set()
        )
    assert all(batches == seen["vanilla"] for batches in seen.values())
    assert all(torch.equal(head, heads["vanilla"]) for head in heads.values())
    counts = {m: json.loads((tmp_path / m / "seed-0" / "run.json").read_text())["trainable_parameters"] for m in seen}
    assert len({counts[m] for m in ("vanilla", "dropout", "emoe", "random", "bottom-k")}) == 1
    assert counts["gmoe"] > counts["emoe-learn"] > counts["emoe"]


def test_another_seed_draws_another_head(start):
    assert not torch.equal(start("emoe", 0)[0].score.weight, start("emoe", 1)[0].score.weight)


def test_the_average_key_gate_follows_the_weights(start):
    """In training, too, where nothing may be kept from an earlier step."""
    model = start("emoe")[0]
    ffn = model.sparse_ffns()[2]
    x_ND = torch.randn(5, 32)
    keys = ffn.linear("gate").weight
    for _ in range(2):
        wanted_NE = x_ND @ keys.detach().unflatten(0, (E, -1)).mean(1).T
        torch.testing.assert_close(ffn.router(x_ND, ffn).logits_NE, wanted_NE)
        with torch.no_grad():
            keys.add_(torch.randn_like(keys))


@pytest.mark.parametrize("method", ["emoe-learn", "gmoe"])
def test_gradients_reach_a_trained_gate(method, start):
    model, texts, data, _ = start(method)
    batch = texts.collate(texts.encode(data.train[:8]))
    labels = batch.pop("labels")
    texts.loss_sum(model(**batch).logits, labels)[0].backward()
    for ffn in model.sparse_ffns().values():
        for parameter in ffn.router.parameters():
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("loss", ["mi", "switch", "concentration", "z"])
def test_padding_has_no_part_in_losses_on_gates(loss, start):
    model, texts, data, _ = start("emoe-learn")
    batch = texts.collate(texts.encode(data.train[:8]))
    found = []
    for more in (0, 7):
        inputs = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, more), value=model.config.pad_token_id),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, more)),
        }
        with watched(model) as routings:
            model(**inputs)
        found.append(auxiliary_loss({loss: 1.0}, routings, inputs["attention_mask"]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def router(rule: str) -> Router:
    config = transformers.LlamaConfig(hidden_size=32)
    for key, value in {"gate": "average-key", "routing": rule, "allocation": "uniform"}.items():
        setattr(config, f"emoe_{key}", value)
    config.emoe_shared_experts = config.emoe_copies = 0
    config.num_experts, config.num_experts_per_tok = 64, 16
    return Router(config, 32)


def test_bottom_k_takes_the_others_and_random_takes_all_alike():
    assert {"bottom-k", "random"} <= set(RULES)
    logits_NE = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    chosen = {rule: router(rule).choose(logits_NE) for rule in ("top-k", "bottom-k", "random")}
    assert (
        logits_NE.gather(1, chosen["bottom-k"])
        .max(1)
        .values.lt(logits_NE.gather(1, chosen["top-k"]).min(1).values)
        .all()
    )
    random_NK = chosen["random"]
    assert torch.equal(random_NK.sort().values, router("random").choose(logits_NE).sort().values)  # no generator
    assert all(len(set(row)) == 16 for row in random_NK.tolist())
    # each expert is chosen by a quarter of the tokens: 1024, standard deviation 28
    counts_E = random_NK.flatten().bincount(minlength=64)
    assert counts_E.sub(1024).abs().max() < 5 * 28
    # and neither large logits nor the neighbouring token's choice tell which
    assert abs(logits_NE.gather(1, random_NK).mean()) < 0.02
    both = torch.zeros(4096, 64).scatter(1, random_NK, 1)
    assert abs((both[:-1] * both[1:]).sum(1).mean() - 4) < 0.2


@pytest.mark.parametrize("rule", ["bottom-k", "random"])
def test_shared_experts_are_always_chosen(rule):
    """An ablation of the choice must not be one of the shared experts, too."""
    found = router(rule)
    found.shared = 2
    experts_NK = found.choose(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)))
    assert (experts_NK < 2).sum(1).eq(2).all()


def test_random_choices_outlive_another_rounding():
    """Another batch's matrix product ends in other last bits: the choice must not be drawn anew for that."""
    logits_NE = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    noise_NE = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    first, second = (
        torch.zeros(2048, 64).scatter(1, router("random").choose(x), 1)
        for x in (logits_NE, logits_NE * (1 + 3e-7 * noise_NE))
    )
    assert (first != second).float().mean() < 1e-4


def test_copies_know_no_shared_experts(tiny_llama, start, tmp_path):
    emoe.convert(str(tiny_llama), output=tmp_path / "shared", preset="finetune", experts=8, top_k=4, layers="2:4",
                 split="random", shared_experts=2, held_out_tokens=0)  # fmt: skip
    model = start("gmoe", model=str(tmp_path / "shared"))[0].eval()
    assert model.config.emoe_shared_experts == 0
    seen = []
    for ffn in model.sparse_ffns().values():
        ffn.router.register_forward_hook(lambda _, __, routing: seen.append(routing.experts_NK))
    model(torch.randint(5, 90, (8, 16), generator=torch.Generator().manual_seed(0)))
    assert all(len(experts_NK.unique()) == 4 for experts_NK in seen)  # the gate has a say in all copies


@pytest.mark.parametrize("method", ["vanilla", "random", "gmoe", "emoe-learn"])
def test_added_experts_are_for_emoe_alone(method, arm_settings, experts, tmp_path):
    emoe.extend(experts, tmp_path / "bigger", experts=2)
    with pytest.raises(UserError, match=f"--method {method}: this model has added experts"):
        finetune(arm_settings(method=method, model=str(tmp_path / "bigger")))
