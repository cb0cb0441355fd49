"""GGUF of the dense model, for llama.cpp and what is built on it. Written a layer at a time by the `gguf` package.

Matrices keep their element type, vectors become float32 as llama.cpp wants them. Read back through transformers' own
loader, which dequantizes. GGUF has no place for how our experts are chosen; it holds the dense model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.checkpoint.companions import copy_companions, title_of
from emoe.errors import UserError
from emoe.exporting.dense import restored
from emoe.exporting.source import Source
from emoe.exporting.spec import Cost, Format, Progress
from emoe.exporting.stock import SILU, activation, has_window
from emoe.exporting.verify import auto_class

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
"""Families whose GGUF transformers reads back as the same model, and their architecture there."""

ACTIVATIONS = {"llama": SILU, "qwen2": SILU, "gpt2": ("gelu_new", "gelu_pytorch_tanh")}
"""Architecture → transformers' names of the activation that llama.cpp computes for it, whatever the model's own."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(numbers: str) -> list[dict[str, Any]]:
    pattern = {"Regex": f"{_WORDS}|{numbers}|{_REST}"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, _LEVEL | {"use_regex": False}]


PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _LEVEL],
    "gpt-2": [_LEVEL],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""llama.cpp's names of splitting rules → the steps in tokenizer.json, with every setting that changes the tokens."""

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def refusal(source: Source) -> str | None:
    """Why there is no GGUF of this model."""
    config, family = source.reader.config, source.reader.spec.model_type
    rope = getattr(config, "rope_parameters", None) or {}
    ways = [
        (source.operated, "experts were taken away or added since its conversion; use --to dense"),
        (family not in ARCHITECTURES, f"only {', '.join(ARCHITECTURES)} can be read back; use --to dense"),
        (auto_class(source) != "AutoModelForCausalLM", "the model has no language head; use --to dense"),
        (
            rope.get("rope_type", "default") != "default",
            f"transformers reads no RoPE scaling ('{rope.get('rope_type')}') back from GGUF, so that it could not be "
            "checked; use --to dense and llama.cpp's own converter",
        ),
        (
            activation(source) not in ACTIVATIONS.get(ARCHITECTURES.get(family), ()),
            f"GGUF cannot say that the FFN's activation is {activation(source)}; use --to dense",
        ),
        (
            ARCHITECTURES.get(family) == "llama" and (getattr(config, "attention_bias", False) or _mlp_bias(source)),
            "its biases would be lost; use --to dense",
        ),
        (
            family == "gpt2" and (config.n_positions != 1024 or source.reader.hidden_width != 4 * config.hidden_size),
            "transformers reads back only GPT-2's own 1,024 positions and FFN of four times the width; use --to dense",
        ),
        (
            family == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights),
            "its attention's own scale would be lost; use --to dense",
        ),
        (has_window(config), "attention within a window would be lost; use --to dense"),
    ]
    return next((why for wrong, why in ways if wrong), None) or _tokenizer_refusal(_tokenizer(source))


def _tokenizer(source: Source) -> dict[str, Any]:
    """tokenizer.json as the library reads it: every setting is there, and of its type.

    Raises:
        UserError: it is missing or damaged.
    """
    from tokenizers import Tokenizer

    path = source.folder / "tokenizer.json"
    try:
        return json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception as error:  # the library raises nothing more exact
        raise UserError(
            f"--to: the file holds the tokenizer, but {path} is not usable ({error}); use --to dense"
        ) from None


def _tokenizer_refusal(settings: dict[str, Any]) -> str | None:
    if settings["model"]["type"] != "BPE" or (settings["decoder"] or {}).get("type") != "ByteLevel":
        return "only byte-level BPE tokenizers are written; use --to dense and llama.cpp's own converter"
    if pre_tokenizer_name(settings["pre_tokenizer"]) is None:
        known = ", ".join(PRE_TOKENIZERS)
        return f"its tokenizer's splitting rule is none of {known}; use --to dense and llama.cpp's own converter"
    return None


def _mlp_bias(source: Source) -> bool:
    return any(kind == "bias" for _, kind in source.reader.ffn_tensors(0).values())


def cost(source: Source) -> Cost:
    """The dense model's tensors and the tokenizer."""
    matrices = f"the dense model, matrices {source.fidelity}"
    return Cost(source.nbytes(), f"{matrices}; nothing is quantised, and no experts are left")


def write(source: Source, folder: Path, progress: Progress) -> dict[str, Any]:
    """``model.gguf``, and the tokenizer's files and licence beside it."""
    import gguf

    arch = ARCHITECTURES[source.reader.spec.model_type]
    writer = gguf.GGUFWriter(folder / FILE, arch)
    _add_facts(writer, source)
    _add_tokenizer(writer, source)
    names = gguf.get_tensor_name_map(_model_arch(arch), source.reader.num_layers)
    pieces = list(_pieces(source))
    for name in pieces:
        shape = source.reader.shape(name)
        dtype = _element_type(source, len(shape))
        shape = shape[::-1] if _transposed(source, name) else shape
        # As bytes, since numpy has no bfloat16: the writer then wants the last dimension in bytes, too.
        shape = [*shape[:-1], shape[-1] * dtype.itemsize]
        kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
        writer.add_tensor_info(_gguf_name(names, name), shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    identical, layers = 0, source.reader.num_layers
    for index in [None, *range(layers)]:
        progress("writing", 0 if index is None else index, layers)
        names_here = [name for name in pieces if name in set(source.reader.layer_names(index))]
        if index is None:
            tensors = source.reader.read(names_here)
        else:
            tensors, same = restored(source, index, lambda tensor: tensor.to(_element_type(source, tensor.ndim)))
            identical += same
        for name in names_here:
            writer.write_tensor_data(_bytes(source, name, tensors[name]))
    writer.close()
    copy_companions(source.folder, folder)
    progress("done", layers, layers)
    return {"layers": len(source.layers), "identical": identical, "file": FILE}


def load(folder: Path, dtype: torch.dtype) -> Any:
    """As a user of transformers loads it."""
    import transformers

    from emoe.assets.gguf import quiet_loader

    with quiet_loader():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=dtype, trust_remote_code=False
        )
    return model.eval()


def _model_arch(name: str) -> Any:
    import gguf

    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _pieces(source: Source) -> Iterator[str]:
    """Tensors to write, in the order of writing; a tied head and masks that old GPT-2 checkpoints hold are left out."""
    tied = source.reader.config.tie_word_embeddings
    for index in [None, *range(source.reader.num_layers)]:
        for name in source.reader.layer_names(index):
            if ".router." in name or (tied and name == "lm_head.weight"):
                continue
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                yield name


def _gguf_name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"--to: GGUF has no name for tensor {name}; use --to dense")
    return found


def _element_type(source: Source, dimensions: int) -> torch.dtype:
    return torch.float32 if dimensions == 1 else source.written


def _transposed(source: Source, name: str) -> bool:
    """GPT-2's Conv1D matrices are (in, out); GGUF has (out, in) throughout."""
    return source.reader.spec.transposed and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _bytes(source: Source, name: str, tensor: torch.Tensor) -> np.ndarray:
    """A tensor as rows of bytes, in the layout of llama.cpp."""
    config = source.reader.config
    if ARCHITECTURES[source.reader.spec.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        tensor = _interleave(tensor, heads)
    if _transposed(source, name):
        tensor = tensor.T
    tensor = tensor.to(_element_type(source, tensor.ndim))
    return tensor.contiguous().view(torch.uint8).numpy()


def _interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers row i with row i + half: put pairs side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_facts(writer: Any, source: Source) -> None:
    config = source.reader.config
    writer.add_name(title_of(source.config["emoe_provenance"], source.folder)[:80])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(source.reader.hidden_width)
    writer.add_head_count(config.num_attention_heads)
    if source.reader.spec.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)  # llama.cpp takes width / heads for both unless told
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, source: Source) -> None:
    """Tokens, kinds, merges, special ids and chat template from tokenizer.json."""
    import gguf

    settings = _tokenizer(source)
    model = settings["model"]
    by_id = {number: token for token, number in model["vocab"].items()}
    special = {added["id"]: added for added in settings["added_tokens"]}
    by_id |= {number: added["content"] for number, added in special.items()}
    size = source.reader.config.vocab_size
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    kind = gguf.TokenType
    kinds = [
        (kind.CONTROL if special[i]["special"] else kind.USER_DEFINED)
        if i in special
        else (kind.NORMAL if i in by_id else kind.UNUSED)
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(settings["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    try:
        gguf.SpecialVocab(source.folder, load_merges=False, n_vocab=size).add_to_gguf(writer, quiet=True)
    except Exception as error:  # it reads tokenizer_config.json and trusts it
        path = source.folder / "tokenizer_config.json"
        raise UserError(f"--to: {path} is not usable ({type(error).__name__}: {error}); use --to dense") from None


def pre_tokenizer_name(settings: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a splitting rule, as `_tokenizer` reads it; None for one that it is not known to have."""
    if not settings:
        return None
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    for name, wanted in PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(w.items() <= step.items() for step, w in zip(steps, wanted, strict=True)):
            return name
    return None


FORMAT = Format(name="gguf", routes=False, refusal=refusal, cost=cost, write=write, load=load)
