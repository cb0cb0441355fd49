"""Every family, end to end on tiny random models: convert, load through the Auto classes, compare with dense."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.masked import MaskedDense, labels_of
from support.tiny import CONFIGS, LAYERS, VOCAB, tiny_checkpoint

import emoe
from emoe.families import FAMILIES

ENCODERS = [name for name, spec in FAMILIES.items() if spec.encoder]


def head_of(family: str):
    """The Auto class that a family's checkpoint is for."""
    return transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM


def some_tokens(rows: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def family_checkpoint(tmp_path_factory):
    """(family, gate) → (dense folder, converted folder), made once."""
    made = {}

    def make(family: str, gate: str, settings: dict):
        if family not in made:
            made[family] = tiny_checkpoint(tmp_path_factory.mktemp(family) / "dense", family)
        if (family, gate) not in made:
            output = tmp_path_factory.mktemp(family) / gate
            emoe.convert(str(made[family]), output=output, **(settings | {"gate": gate}))
            made[family, gate] = output
        return made[family], made[family, gate]

    return make


def test_every_known_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("gate", ["discriminant", "representative", "average-key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_is_the_masked_dense_model(family, gate, family_checkpoint, settings):
    """At every K the MoE equals the dense model with the unchosen experts' neurons zeroed; at K = E the dense model."""
    dense_folder, folder = family_checkpoint(family, gate, settings)
    dense = head_of(family).from_pretrained(dense_folder).eval()
    model = head_of(family).from_pretrained(folder).eval()
    assert type(model).__name__ == "EMoE" + type(dense).__name__
    tokens = some_tokens()
    with torch.no_grad():
        expected = dense(tokens).logits
        for top_k in (1, 3, 7):
            model.set_top_k(top_k)
            masked = MaskedDense(dense, family, folder, gate, 8, top_k)
            reference = dense(tokens).logits
            masked.remove()
            assert (reference - expected).abs().max() > 1e-2  # the mask matters, so the next line can fail
            torch.testing.assert_close(model(tokens).logits, reference, rtol=0, atol=2e-4)
        model.set_top_k(8)
        assert (model(tokens).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_trainable_parameter_is_added(family, family_checkpoint, settings):
    dense_folder, folder = family_checkpoint(family, "discriminant", settings)
    dense, model = head_of(family).from_pretrained(dense_folder), head_of(family).from_pretrained(folder)
    assert model.num_parameters(only_trainable=True) == dense.num_parameters(only_trainable=True)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    extra = {n.rsplit(".", 1)[1] for n, b in model.named_buffers() if ".router." in n}
    assert extra == {"weight", "bias", "bounds", "threshold"}
    entries = sum(b.numel() for n, b in model.named_buffers() if ".router." in n)
    assert entries == LAYERS * 8 * (model.config.hidden_size + 1 + 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_is_the_source_bit_for_bit(family, family_checkpoint, settings, tmp_path):
    dense_folder, folder = family_checkpoint(family, "discriminant", settings)
    result = emoe.export(folder, tmp_path / "back", verify_tokens=256)
    assert result["identical"] == result["layers"] == LAYERS
    source, back = head_of(family).from_pretrained(dense_folder), head_of(family).from_pretrained(tmp_path / "back")
    assert type(back) is type(source)
    for name, tensor in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(back.eval()(some_tokens()).logits, source.eval()(some_tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_source_up_to_the_permutation(family, family_checkpoint, settings):
    """Every tensor but the FFN's is untouched; experts are contiguous blocks of the labels' neurons."""
    dense_folder, folder = family_checkpoint(family, "discriminant", settings)
    spec = FAMILIES[family]
    source = head_of(family).from_pretrained(dense_folder).state_dict()
    ours = head_of(family).from_pretrained(folder).state_dict()
    labels = labels_of(folder)
    ffn_modules = {f"{spec.ffn}.{getattr(spec, r)}".lstrip(".") for r in ("gate", "up", "down") if getattr(spec, r)}
    for name, tensor in source.items():
        layer = name.split(f"{spec.layers}.")[-1].split(".", 1) if f"{spec.layers}." in name else ["", ""]
        if layer[1].rsplit(".", 1)[0] not in ffn_modules:
            assert torch.equal(ours[name], tensor), name
        elif layer[1].endswith(f"{spec.up}.weight"):
            order = torch.argsort(labels[int(layer[0])], stable=True)
            rows = tensor.T if spec.transposed else tensor
            ours_rows = ours[name].T if spec.transposed else ours[name]
            assert torch.equal(ours_rows[: len(order)], rows[order]), name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS])
def test_prefill_equals_token_by_token_decoding(family, family_checkpoint, settings):
    _, folder = family_checkpoint(family, "discriminant", settings)
    model = head_of(family).from_pretrained(folder).eval()
    tokens = some_tokens(2, 20)
    with torch.no_grad():
        whole = model(tokens).logits
        cache, steps = None, []
        for i in range(tokens.shape[1]):
            out = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classification_loads_and_trains(family, family_checkpoint, settings):
    _, folder = family_checkpoint(family, "average-key", settings)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert type(model).__name__.startswith("EMoE")
    out = model(some_tokens(4, 12), labels=torch.tensor([0, 1, 2, 0]))
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    down = [n for n in grads if n.endswith(f"{FAMILIES[family].down}.weight") and "att" not in n]
    assert len(down) == LAYERS
    assert all(grads[n].abs().sum() > 0 for n in down)
