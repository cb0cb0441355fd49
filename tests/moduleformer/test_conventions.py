"""ModuleFormer as transformers expects a model: saving, Auto classes, generation, checkpointing, types."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

import emoe


def test_auto_classes_know_it():
    """In a fresh process, by `import emoe` alone."""
    code = (
        "import emoe, transformers as t; c = t.AutoConfig.for_model('moduleformer', n_layer=1, n_embd=8, att_hidden=8, "
        "ffd_hidden=8, vocab_size=11, pad_token_id=0, num_labels=2);"
        "print(*[type(a.from_config(c)).__name__ for a in "
        "(t.AutoModel, t.AutoModelForCausalLM, t.AutoModelForSequenceClassification)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [
        "ModuleFormerModel",
        "ModuleFormerForCausalLM",
        "ModuleFormerForSequenceClassification",
    ], done.stderr[-2000:]


@pytest.mark.parametrize("options", [{}, {"att_hidden": 12, "n_head": 1}, {"gate_type": "gmm"}])
def test_round_trip(tiny, ids, tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is emoe.ModuleFormerForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(model.state_dict())
    assert "transformer.h.1.attn.q_proj.output_experts.weight" in names
    assert ("transformer.h.0.attn.k_proj.weight" in names) == ("n_head" not in options)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_released_checkpoints(tiny, ids, tmp_path):
    """A .bin with the released code's dead buffers loads, says nothing of them, and is never unpickled freely."""
    model = tiny(att_hidden=12, n_head=1)
    state = dict(model.state_dict())
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.mask"] = torch.ones(8, 8, dtype=torch.int8).tril()
        state[f"transformer.h.{layer}.attn.cum_weight"] = torch.ones(8, 8).tril(-1)
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    again, report = emoe.ModuleFormerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(ids).logits, model(ids).logits)

    torch.save({"lm_head.weight": _Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only|WeightsUnpickler"):
        emoe.ModuleFormerForCausalLM.from_pretrained(tmp_path)


class _Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_without_our_packages(tiny, ids, tmp_path):
    """With trust_remote_code a checkpoint runs where our packages are not installed, and saves again."""
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("emoe", "emoe_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
ids = torch.load({str(tmp_path / "ids.pt")!r}, weights_only=True)
for folder in ("model", "copy"):
    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + folder, trust_remote_code=True)
    out = model.train()(ids, labels=ids, output_attentions=True)
    out.loss.backward()
    model.eval().save_pretrained({str(tmp_path)!r} + "/copy")
    head = transformers.AutoModelForSequenceClassification
    head.from_pretrained({str(tmp_path)!r} + "/" + folder, trust_remote_code=True)
    more = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
torch.save((model(ids).logits.detach(), more, out.attentions[0].detach()), {str(tmp_path / "out.pt")!r})
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, more, attentions = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attentions, model(ids, output_attentions=True).attentions[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(more, model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("options", [{}, {"att_hidden": 12, "n_head": 1}])
def test_generation(tiny, ids, options):
    """Greedy and beams against the model without a cache; sampling repeats with its seed; left padding changes none."""
    model = tiny(**options)
    common = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **common)
    slow = ids
    for _ in range(6):
        slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, slow)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, do_sample=False, **common)[:, 3:], greedy)
    assert torch.equal(model.generate(ids, cache_implementation="static", do_sample=False, **common), greedy)
    beams = model.generate(ids, num_beams=3, do_sample=False, **common)
    assert torch.equal(beams, model.generate(ids, num_beams=3, do_sample=False, use_cache=False, **common))
    score = lambda text: model(text).logits.log_softmax(-1)[:, 6:-1].gather(2, text[:, 7:, None]).sum()  # noqa: E731
    assert score(beams) >= score(greedy) - 1e-4
    torch.manual_seed(3)
    sampled = model.generate(ids, do_sample=True, **common)
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(ids, do_sample=True, **common))


def test_identity_keeps_one_tensor_in_the_cache(tiny, ids):
    layer = tiny(att_hidden=12, n_head=1)(ids, use_cache=True).past_key_values.layers[0]
    assert layer.values is layer.keys


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny, ids, reentrant):
    """The same loss and gradients, the auxiliary loss's among them, with drawn experts and dropout."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny(sample_topk=1, resid_pdrop=0.1, moe_pdrop=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, msg=name)


def test_bfloat16(tiny, ids):
    """Weights in bf16 and autocast over fp32 weights both train; logits stay fp32 and near the fp32 model's."""
    model = tiny()
    wanted = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(ids, labels=ids)
        out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    half = tiny().to(torch.bfloat16)
    out = half(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert (out.logits - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_tie_and_resize(tiny, ids, tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.resize_token_embeddings(35)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(ids).logits.shape[-1] == model.config.vocab_size == 35
    model.save_pretrained(tmp_path)
    assert torch.equal(emoe.ModuleFormerForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    loose = tiny()
    before = loose(ids).logits
    loose.resize_token_embeddings(35)
    torch.testing.assert_close(loose(ids).logits[..., :29], before)


def test_outputs_on_request(tiny, ids):
    model = tiny()
    out = model(ids, use_cache=False)
    assert out.past_key_values is out.attentions is out.hidden_states is out.routing is None
    out = model(ids, output_attentions=True, output_router_logits=True, output_hidden_states=True)
    assert out.attentions[0].shape == (2, 2, 2, 7, 7)
    assert len(out.hidden_states) == 3
    assert [r.shape for r in out.router_logits] == [(14, 4), (14, 5)] * 2
    aux_loss, logits, *_ = model(ids, return_dict=False)
    torch.testing.assert_close((aux_loss, logits), (out.aux_loss, out.logits), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 1, 7, 7))


def test_sequence_classification(tiny, ids):
    """The last token by the mask, by the padding token, or refused; the loss holds the gates' share."""
    model = tiny(kind=emoe.ModuleFormerForSequenceClassification, num_labels=3)
    short = ids.clone()
    short[1, 4:] = 0
    mask = (short != 0).long()
    wanted = torch.cat([model(ids[:1]).logits, model(ids[1:, :4]).logits])
    torch.testing.assert_close(model(short).logits, wanted)
    torch.testing.assert_close(model(short, attention_mask=mask).logits, wanted)
    left, left_mask = short.clone(), mask.flip(1)
    left[1] = short[1].roll(3)
    torch.testing.assert_close(
        model(left, attention_mask=torch.stack([mask[0], left_mask[1]])).logits, wanted, rtol=1e-5, atol=1e-5
    )
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="attention_mask"):
        model(short)
    labels = torch.tensor([0, 2])
    found = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    cross_entropy = torch.nn.functional.cross_entropy(found.logits, labels)
    aux = model.transformer(ids).aux_loss
    torch.testing.assert_close(found.loss, cross_entropy + 0.1 * aux)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gate_type": "mpl"}, "known: mlp"),
        ({"aux_loss_type": "none"}, "known: mi"),
        ({"n_head": 3}, "not divisible by n_head=3"),
        ({"k_att": 40}, "between 1 and n_att_experts"),
        ({"sample_topk": 3}, "between 0 and k_att"),
    ],
)
def test_bad_configurations(bad, message):
    with pytest.raises(ValueError, match=message):
        emoe.ModuleFormerConfig(**bad)
