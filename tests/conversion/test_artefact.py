"""The converted checkpoint as a thing of its own: it loads everywhere, routes in fp32, and never passes for dense."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.fresh import LOAD, run_fresh
from support.tiny import LAYERS, VOCAB

from emoe_kernels import use

TOKENS = torch.randint(5, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(converted_llama):
    return transformers.AutoModelForCausalLM.from_pretrained(converted_llama).eval()


@pytest.mark.parametrize("hide", ["with", "without"])
def test_a_fresh_process_computes_the_same_logits(hide, model, converted_llama, tmp_path):
    """Bit for bit, with our packages and without them: then with the checkpoint's own copy of the code, which has the
    portable kernels alone, where faster ones add up in another order."""
    module = run_fresh(LOAD, hide, converted_llama, tmp_path / "logits.safetensors").strip()
    assert module.startswith("transformers_modules") == (hide == "without")
    with torch.no_grad(), use("portable") if hide == "without" else nullcontext():
        assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], model(TOKENS).logits)


def test_without_our_code_nothing_loads(converted_llama):
    """Not trusting the code means an error, never a silent dense model."""
    code = """
        import sys
        sys.modules["emoe"] = sys.modules["emoe_kernels"] = None
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
        except Exception as error:
            print("refused", type(error).__name__)
    """
    assert run_fresh(code, converted_llama).startswith("refused")


def test_the_stock_class_complains(converted_llama):
    """Somebody who names the dense class on purpose is told that this is another kind of model."""
    code = """
        import sys, transformers
        transformers.LlamaConfig.from_pretrained(sys.argv[1])  # the first thing LlamaForCausalLM.from_pretrained does
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(converted_llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "emoe_llama" in done.stderr


def test_import_order_does_not_matter():
    """`import emoe` before transformers, and whichever Auto class is touched first."""
    for first in ("AutoModelForCausalLM", "LlamaConfig"):
        code = f"""
            import emoe, transformers
            transformers.{first}
            print(transformers.AutoConfig.for_model("emoe_llama", num_experts=4).model_type)
        """
        assert run_fresh(code).strip() == "emoe_llama"


def test_config_tells_what_it_is(converted_llama):
    config = json.loads((converted_llama / "config.json").read_text())
    assert config["model_type"] == "emoe_llama"
    assert config["num_experts"] == 8
    assert config["num_experts_per_tok"] == 3
    assert config["emoe_layers"] == list(range(LAYERS))
    assert config["emoe_gate"] == "discriminant"
    assert config["emoe_provenance"]["split"]["method"] == "coactivation"
    autos = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert autos <= set(config["auto_map"])
    companions = ("emoe_config.yaml", "emoe_report.json", "emoe_report.png", "README.md", "tokenizer.json")
    for name in (*companions, "partition.safetensors", "generation_config.json"):
        assert (converted_llama / name).is_file(), name


def test_a_token_does_not_depend_on_its_batch_mates(model):
    with torch.no_grad():
        together, alone = model(TOKENS).logits, model(TOKENS[:1]).logits
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_padding_changes_nothing(model):
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), TOKENS[:1]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
        torch.testing.assert_close(logits[:, 5:], model(TOKENS[:1]).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generates_with_a_cache(attention, converted_llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(converted_llama, attn_implementation=attention).eval()
    tokens = model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    current = TOKENS
    with torch.no_grad():
        for _ in range(6):
            current = torch.cat([current, model(current, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, current)


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        model(TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert plain["model.layers.1.mlp.down_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("way", ["loaded", "cast", "half"])
def test_routing_stays_in_fp32(way, converted_llama):
    """However a model gets its narrow weights, the gate tables keep every bit."""
    full = transformers.AutoModelForCausalLM.from_pretrained(converted_llama)
    if way == "loaded":
        narrow = transformers.AutoModelForCausalLM.from_pretrained(converted_llama, dtype=torch.bfloat16)
    else:
        narrow = transformers.AutoModelForCausalLM.from_pretrained(converted_llama)
        narrow = narrow.bfloat16() if way == "cast" else narrow.half()
    assert narrow.model.layers[0].mlp.up_proj.weight.dtype == (torch.float16 if way == "half" else torch.bfloat16)
    buffers = dict(full.named_buffers())
    routers = {n: b for n, b in narrow.named_buffers() if ".router." in n}
    assert len(routers) == 4 * LAYERS
    for name, buffer in routers.items():
        assert torch.equal(buffer, buffers[name]), name
    if way != "half":
        with torch.no_grad():
            assert torch.isfinite(narrow(TOKENS).logits).all()


def test_a_cast_model_lets_go_of_its_file(converted_llama):
    """The tables that stay fp32 would keep the whole file mapped if they were views of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(converted_llama, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert str(converted_llama) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("gate", ["representative", "average-key"])
def test_weights_written_behind_the_gate_s_back_are_noticed(gate, tiny_llama, settings, tmp_path):
    """`weight.data += …`, as adapters merge themselves, moves no version counter."""
    import emoe

    emoe.convert(str(tiny_llama), output=tmp_path / "out", **(settings | {"gate": gate, "held_out_tokens": 0}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ffn = model.model.layers[0].mlp
    x_ND = torch.randn(6, 32)
    before = ffn.router(x_ND, ffn).logits_NE
    ffn.gate_proj.weight.data += 0.1 * torch.randn_like(ffn.gate_proj.weight)
    after = ffn.router(x_ND, ffn).logits_NE
    assert (after - before).abs().max() > 1e-3
    model.train()
    torch.testing.assert_close(ffn.router(x_ND, ffn).logits_NE, after)


def test_top_k_is_checked(model):
    for wrong in (0, 9, -1):
        with pytest.raises(ValueError, match=f"top_k={wrong} must lie between 1 and num_experts=8"):
            model.set_top_k(wrong)
    for wrong in (2.5, True):
        with pytest.raises(ValueError, match=f"top_k={wrong} must be a whole number"):
            model.set_top_k(wrong)


@pytest.mark.parametrize("wrong", [0, 9, -1, 2.5, "3"])
def test_top_k_is_checked_on_loading(wrong, converted_llama):
    """Given to `from_pretrained`, it comes after the configuration's own checks; 0 would be read as all experts."""
    with pytest.raises(ValueError, match=f"num_experts_per_tok={wrong!r} must "):
        transformers.AutoModelForCausalLM.from_pretrained(converted_llama, num_experts_per_tok=wrong)


def test_saving_again_keeps_everything(model, converted_llama, tmp_path):
    """After fine-tuning, say: the copy loads alone, and still knows its partition."""
    model.save_pretrained(tmp_path / "again")
    copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(copy(TOKENS).logits, model(TOKENS).logits)
    for name in ("partition.safetensors", "modeling_emoe.py", "ffn_emoe.py", "routing_emoe.py", "portable.py"):
        assert (tmp_path / "again" / name).read_bytes() == (converted_llama / name).read_bytes()
    run_fresh(LOAD, "without", tmp_path / "again", tmp_path / "logits.safetensors")


class Wrapped(torch.nn.Module):
    """What an adapter does to a linear: another module in its place, with the weight inside and something added."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = torch.nn.Parameter(torch.randn_like(base.weight) * 0.05)

    def forward(self, x):
        return self.base(x) + torch.nn.functional.linear(x, self.delta)


@pytest.mark.parametrize("gate", ["discriminant", "representative", "average-key"])
def test_an_adapter_on_the_linears_counts_everywhere(gate, tiny_llama, settings, tmp_path):
    """Wrapped linears give what the merged weights give: in the experts and in gates that read the weights."""
    import emoe

    emoe.convert(str(tiny_llama), output=tmp_path / "out", **(settings | {"gate": gate, "held_out_tokens": 0}))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        before = merged(TOKENS).logits
        for ours, theirs in zip(merged.model.layers, wrapped.model.layers, strict=True):
            for name in ("gate_proj", "up_proj", "down_proj"):
                adapter = Wrapped(theirs.mlp.get_submodule(name))
                setattr(theirs.mlp, name, adapter)
                ours.mlp.get_submodule(name).weight += adapter.delta
        assert (merged(TOKENS).logits - before).abs().max() > 0.1  # gates derived from the weights noticed the change
        torch.testing.assert_close(wrapped(TOKENS).logits, merged(TOKENS).logits, rtol=0, atol=5e-4)
    wrapped(TOKENS, labels=TOKENS).loss.backward()
    assert wrapped.model.layers[1].mlp.up_proj.delta.grad.abs().sum() > 0
