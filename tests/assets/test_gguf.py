"""Law: a model written as float32 GGUF and imported gives the logits of the model it was written from."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from emoe.assets import gguf as importer
from emoe.assets import resolve_model
from emoe.assets.manifest import read_manifest
from emoe.errors import UserError

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 4, 2, 32, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*SPECIAL, *ALPHABET, "ĠĠ", "ĠĠĠ"]  # runs of spaces show whether digits are split off first
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def permute(weight, heads):
    """GGUF's order of rotary pairs, the inverse of what transformers undoes when it reads."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture="llama", more=lambda writer: None):
    writer = gguf.GGUFWriter(path, architecture)
    more(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(LAYERS):
        names.update({f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in parts.items()})
    state = model.state_dict()
    for name, target in names.items():
        weight = state[name].numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            weight = permute(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(target, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(source, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", source)


def test_the_imported_folder_is_the_source_model(source, gguf_file, tmp_path):
    folder = importer.import_gguf(gguf_file, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert config["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06, which is how float32 spells it
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "again")  # transformers refuses this for what its own loader returns


def test_the_tokenizer_round_trips(gguf_file, tmp_path):
    folder = importer.import_gguf(gguf_file, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello world", "  def f(x):\n\treturn 12", "café 日本 \U0001f600", "<|im_start|>a<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # "smollm" splits digits off before anything else, so the three spaces stay together
    assert tokenizer("x   5").tokens() == ["x", "ĠĠĠ", "5"]
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_a_gguf_file_is_imported_once_and_found_by_its_digest(gguf_file, monkeypatch, home):
    first = resolve_model(str(gguf_file))
    assert first.kind == "gguf" and first.folder.parent == home / "gguf"
    digest = read_manifest(first.folder)["source_sha256"]
    assert first.folder.name == digest[:16] and digest in first.source

    def twice(*_):
        raise AssertionError("imported again")

    plain = importer.import_gguf
    monkeypatch.setattr(importer, "import_gguf", twice)
    assert resolve_model(str(gguf_file)).folder == first.folder
    monkeypatch.setattr(importer, "import_gguf", plain)
    (first.folder / "model.safetensors").write_bytes(b"short")
    resolve_model(str(gguf_file))
    assert (first.folder / "model.safetensors").stat().st_size > 1000


def test_progress_bars_are_as_they_were(gguf_file, tmp_path, capfd):
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    before = loader.tqdm, logging.is_progress_bar_enabled(), logging.get_verbosity()
    importer.import_gguf(gguf_file, tmp_path / "plain")
    assert (loader.tqdm, logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert "it/s" not in capfd.readouterr().err


def test_what_transformers_cannot_read_is_one_line(source, tmp_path):
    path = write_gguf(tmp_path / "odd.gguf", source, architecture="nosuch")
    with pytest.raises(UserError, match=r"odd\.gguf: transformers cannot read this GGUF file") as caught:
        importer.import_gguf(path, tmp_path / "plain")
    assert "\n" not in str(caught.value) and not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(WIDTH // HEADS // 2, np.float32)),
    ],
    ids=["linear", "llama3"],
)
def test_scaled_positions_are_refused(more, source, tmp_path):
    """transformers would leave the scaling out without a word."""
    path = write_gguf(tmp_path / "scaled.gguf", source, more=more)
    with pytest.raises(UserError, match="positions are scaled"):
        importer.import_gguf(path, tmp_path / "out")
    unscaled = write_gguf(
        tmp_path / "plain.gguf", source, more=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    )
    assert (importer.import_gguf(unscaled, tmp_path / "out") / "config.json").is_file()


def test_without_the_gguf_package(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        importer.import_gguf(gguf_file, tmp_path / "plain")
