"""`experts_implementation="emoe"` computes what "eager" does: logits and all gradients of stock models."""

import pytest
import torch
import transformers
from support.dtypes import skip_without
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import emoe_kernels.integrations.transformers as integration
from emoe_kernels import extension, use

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "Mixtral": lambda: transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=6),
    "Olmoe": lambda: transformers.OlmoeConfig(**SIZES, intermediate_size=24, num_experts=6),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=48, moe_intermediate_size=24, num_experts=6, head_dim=8, norm_topk_prob=True
    ),
    "GptOss": lambda: transformers.GptOssConfig(
        **SIZES, intermediate_size=24, num_local_experts=6, head_dim=8, layer_types=["full_attention"] * 2
    ),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(autouse=True, params=("portable", "cpu") if extension.status().available else ("portable",))
def _implementation(request):
    """Held fixed, so that both are given fused and transposed weights, with and without a GPU."""
    with use(request.param):
        yield request.param


def build(family, implementation="eager", dtype=torch.float32):
    """A tiny random model; biases too, which transformers would leave at zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), experts_implementation=implementation, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if "bias" in name else 0.2)
    return model


def tokens():
    return torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))


def error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    return float(difference / norm) if norm > 0 else float(difference)


def logits_and_gradients(model):
    model.zero_grad()
    logits = model(tokens()).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens().flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


@FAMILIES
def test_logits_and_all_gradients_equal_eager(family, monkeypatch):
    model = build(family)
    expected = logits_and_gradients(model)
    assert any("experts" in name for name in expected)
    calls = []
    forward = integration.experts_forward
    monkeypatch.setitem(
        integration.moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "emoe", lambda *a: calls.append(1) or forward(*a)
    )
    model.set_experts_implementation("emoe")
    actual = logits_and_gradients(model)
    assert len(calls) == 2  # the layers did go through it
    assert actual.keys() == expected.keys()
    for name in expected:
        assert error(actual[name], expected[name]) <= 1e-5, name
    with torch.no_grad():
        assert error(model(tokens()).logits, expected["logits"]) <= 1e-5
        one = model(tokens()[:1, :1]).logits  # a single token, as in decoding
    assert error(one, expected["logits"][:1, :1]) <= 1e-5


@FAMILIES
def test_bf16_is_as_exact_as_eager(family, _implementation):
    """Both against fp32 on the same bf16 weights; ours may err 1.25 times as much as theirs."""
    skip_without(_implementation, torch.bfloat16)
    eager, ours = build(family, "eager", torch.bfloat16), build(family, "emoe", torch.bfloat16)
    exact = build(family)
    exact.load_state_dict({k: v.float() for k, v in eager.state_dict().items()})
    with torch.no_grad():
        yardstick = error(eager(tokens()).logits, expected := exact(tokens()).logits)
        assert error(ours(tokens()).logits, expected) <= 1.25 * yardstick
    gradients = logits_and_gradients(ours)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients.values())


@FAMILIES
def test_save_load_and_generate(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="emoe")
    assert ours.config._experts_implementation == "emoe"
    with torch.no_grad():
        assert error(ours(tokens()).logits, model(tokens()).logits) <= 1e-5
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(tokens()[:1], **greedy), model.generate(tokens()[:1], **greedy))


def test_autocast_is_followed(_implementation):
    skip_without(_implementation, torch.bfloat16)
    model = build("Mixtral", "emoe")
    with torch.no_grad():
        expected = model(tokens()).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(tokens()).logits
    assert 1e-4 < error(actual, expected) < 5e-2


# Experts as no stock model has them


def experts(activation="silu", D=12, S=8, E=5, **decorations):
    """An experts module with random weights."""
    gated = decorations.get("has_gate", True)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            into, back = (E, (1 + gated) * S, D), (E, D, S)
            if decorations.get("is_transposed"):
                into, back = (E, D, (1 + gated) * S), (E, S, D)
            name = "gate_up_proj" if gated else "up_proj"
            setattr(self, name, nn.Parameter(torch.randn(into) / D**0.5))
            self.down_proj = nn.Parameter(torch.randn(back) / S**0.5)
            if decorations.get("has_bias"):
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, (1 + gated) * S)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))
            self.act_fn = ACT2FN[activation]

        def forward(self, *arguments):
            raise AssertionError("not this one")

    torch.manual_seed(0)
    config = transformers.MixtralConfig()
    module = use_experts_implementation(Experts, **decorations)(config)
    return module, config


def compare(module, config, choices=None):
    """Against transformers' own batched_mm: output and every gradient."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20, 12, generator=g, requires_grad=True)
    weights = torch.rand(20, 2, generator=g, requires_grad=True)
    choices = torch.rand(20, 5, generator=g).argsort(1)[:, :2] if choices is None else choices
    results = []
    for implementation in ("batched_mm", "emoe"):
        config._experts_implementation = implementation
        y = module(x, choices, weights)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, weights, *module.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_layout(has_gate, is_transposed, has_bias):
    compare(*experts(has_gate=has_gate, is_transposed=is_transposed, has_bias=has_bias))


KNOWN = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2"]


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("activation", [*KNOWN, "mish"])
def test_every_activation(activation, has_gate):
    module, config = experts(activation, has_gate=has_gate)
    assert (integration._activation(module) is None) == (activation == "mish")  # that one runs between two linears
    compare(module, config)


@pytest.mark.parametrize("activation", ["silu", "mish"])
def test_experts_of_other_processes_are_left_out(activation):
    """In expert parallelism ids from E on are somebody else's; their weights are zero by then."""
    module, config = experts(activation, has_bias=True)
    module._is_expert_parallel = True
    choices = torch.rand(20, 5, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :2]
    choices[4] = choices[7, 1] = 5
    compare(module, config, choices)


def test_a_norm_behind_each_expert_is_refused():
    module, config = experts(has_post_expert_norm=True)
    config._experts_implementation = "emoe"
    with pytest.raises(ValueError, match=r'experts_implementation="emoe" does not support Experts: .* end in a norm'):
        module(torch.zeros(1, 12), torch.zeros(1, 1).long(), torch.ones(1, 1))
