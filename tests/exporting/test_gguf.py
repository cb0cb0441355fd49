"""GGUF of the dense model: transformers' own loader reads the same weights and the same tokens out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.routing import FIXED
from support.tiny import TEXT, VOCAB, tiny_checkpoint

import emoe
from emoe.assets.gguf import import_gguf
from emoe.cli.main import main
from emoe.errors import UserError
from emoe.exporting.gguf import pre_tokenizer_name
from emoe.exporting.hub import packed
from emoe.report.inspect import describe

TOKENS = torch.randint(5, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


def byte_level_tokenizer(folder: Path) -> None:
    """As SmolLM's: digits apart, then byte-level BPE; its vocabulary is smaller than the model's, as often."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 6, special_tokens=["<|end|>", "<s>", "</s>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def source(request, settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    # all that transformers' loader of GPT-2 can read: it leaves these at their defaults
    shape = {"n_positions": 1024, "n_inner": 128} if request.param == "gpt2" else {}
    dense = tiny_checkpoint(folder / "dense", request.param, **shape)
    byte_level_tokenizer(dense)
    emoe.convert(str(dense), output=folder / "out", **(settings | FIXED))
    return folder / "out"


def test_it_is_read_back_as_the_dense_model(source, tmp_path):
    report = emoe.export(source, tmp_path / "out", "gguf", verify_tokens=256)
    assert report["identical"] == report["layers"] == 4
    assert packed(tmp_path / "out").left_out == []
    assert report["comparisons"][0]["max_difference"] < 1e-4
    assert main(["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html"), "--quiet"]) == 0
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    dense = transformers.AutoModelForCausalLM.from_pretrained(source.parent / "dense").eval()
    weights = dict(read.named_parameters())
    for name, weight in dense.named_parameters():
        assert torch.equal(weights[name], weight), name
    tokenizers = [
        transformers.AutoTokenizer.from_pretrained(source.parent / "dense"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf"),
    ]
    ids, again = (tokenizer(TEXT, add_special_tokens=False).input_ids for tokenizer in tokenizers)
    assert ids == again


def test_in_bfloat16(source, tmp_path):
    report = emoe.export(source, tmp_path / "out", "gguf", dtype="bfloat16", verify_tokens=256)
    assert report["identical"] == 0
    assert "matrices rounded to bfloat16" in report["exactness"]
    assert 1e-7 < report["comparisons"][0]["kl"] < 0.02
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source.parent / "dense")
    weights = dict(read.named_parameters())
    for name, weight in dense.named_parameters():
        wanted = weight.bfloat16().float() if weight.ndim > 1 else weight
        assert torch.equal(weights[name].float(), wanted), name


def test_emoe_converts_it_again(source, tmp_path):
    """The circle closes: our own import of GGUF files makes a plain folder of it."""
    emoe.export(source, tmp_path / "out", "gguf", verify_tokens=0)
    assert describe(tmp_path / "out")["export"]["format"] == "gguf"
    assert describe(tmp_path / "out")["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    plain = import_gguf(tmp_path / "out" / "model.gguf", tmp_path / "plain")
    models = [transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (plain, source.parent / "dense")]
    with torch.no_grad():
        torch.testing.assert_close(models[0](TOKENS).logits, models[1](TOKENS).logits)


def test_heads_of_their_own_width_are_said(settings, tmp_path):
    """llama.cpp takes the model's width over the number of heads otherwise, and does not load the file."""
    import gguf

    dense = tiny_checkpoint(tmp_path / "dense", "llama", head_dim=16)
    byte_level_tokenizer(dense)
    emoe.convert(str(dense), output=tmp_path / "out", **(settings | FIXED))
    report = emoe.export(tmp_path / "out", tmp_path / "gguf", "gguf", verify_tokens=256)
    assert report["comparisons"][0]["max_difference"] < 1e-4
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    facts = ["attention.key_length", "attention.value_length", "rope.dimension_count"]
    assert [fields[f"llama.{name}"].contents() for name in facts] == [16, 16, 16]


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_model_without_a_language_head_is_refused(head, settings, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", head=head)
    byte_level_tokenizer(dense)
    emoe.convert(str(dense), output=tmp_path / "out", **(settings | FIXED))
    with pytest.raises(UserError, match="no language head; use --to dense"):
        emoe.export(tmp_path / "out", tmp_path / "gguf", "gguf")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNSAID = [
    ("llama", {"hidden_act": "gelu"}, "the FFN's activation is gelu"),
    ("gpt2", {"activation_function": "relu"}, "the FFN's activation is relu"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its attention's own scale"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}},
        r"no RoPE scaling \('llama3'\).* could not be checked",
    ),
]


@pytest.mark.parametrize(("family", "shape", "reason"), UNSAID)
def test_what_the_file_cannot_say_is_refused(family, shape, reason, settings, tmp_path):
    shape = shape | ({"n_positions": 1024, "n_inner": 128} if family == "gpt2" else {})
    byte_level_tokenizer(tiny_checkpoint(tmp_path / "dense", family, **shape))
    emoe.convert(str(tmp_path / "dense"), output=tmp_path / "out", **(settings | FIXED))
    with pytest.raises(UserError, match=rf"{reason}.*; use --to dense"):
        emoe.export(tmp_path / "out", tmp_path / "gguf", "gguf", verify_tokens=0)


DAMAGED = [
    ("tokenizer.json", {"model": []}),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Sequence"}}),
    ("tokenizer.json", {"added_tokens": [{"id": "first"}]}),
    ("tokenizer.json", None),
    ("tokenizer_config.json", {"chat_template": [5]}),
]


@pytest.mark.parametrize(("file", "change"), DAMAGED)
def test_a_damaged_tokenizer_is_one_line(file, change, source, tmp_path):
    model = shutil.copytree(source, tmp_path / "model")
    if change:
        settings = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(settings | change))
    else:
        (model / file).unlink()
    with pytest.raises(UserError, match=rf"{file} is not usable \(.*\); use --to dense$"):
        emoe.export(model, tmp_path / "out", "gguf", verify_tokens=0)
    assert not (tmp_path / "out").exists()


def test_splitting_rules_are_known_by_their_steps():
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bare = level | {"use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    qwen2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{rest}"
    llama = qwen2.replace("+|\\p{N}|", "+|\\p{N}{1,3}|")
    split = lambda rule: {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}  # noqa: E731
    sequence = lambda *steps: {"type": "Sequence", "pretokenizers": list(steps)}  # noqa: E731
    assert pre_tokenizer_name(level) == "gpt-2"
    assert pre_tokenizer_name(sequence(digits, level)) == "smollm"
    assert pre_tokenizer_name(sequence(split(qwen2), bare)) == "qwen2"
    assert pre_tokenizer_name(sequence(split(llama), bare)) == "llama-bpe"
    others = [
        None,
        bare,  # does not split at all
        level | {"add_prefix_space": True},
        sequence(digits | {"individual_digits": False}, level),
        sequence(split("x"), bare),
        sequence(split(qwen2.removesuffix(rest)), bare),
        sequence(split(qwen2), level),  # splits twice
        sequence(split(qwen2) | {"behavior": "Removed"}, bare),
    ]
    assert [pre_tokenizer_name(other) for other in others] == [None] * len(others)
