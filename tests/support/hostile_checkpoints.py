"""Faults of a dense checkpoint: weights, index, config.json and tokenizer that are damaged or mean harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from support.bench import Bench, convert, fault
from support.tiny import tiny_checkpoint


def _weights(name: str, answer: str, content: Callable[[bytes], bytes]) -> None:
    @fault(name, "convert", answer)
    def _(bench: Bench) -> list[str]:
        model = bench.copy("dense")
        file = model / "model.safetensors"
        file.write_bytes(content(file.read_bytes()))
        return convert(model, bench.inputs, bench.output)


def _header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


DAMAGED = "is truncated or damaged"
_weights("safetensors header of 4 EiB", DAMAGED, lambda _: struct.pack("<Q", 1 << 62) + b"{}")
_weights("header said to be 90 MB in a file of 10 bytes", DAMAGED, lambda _: struct.pack("<Q", 90 << 20) + b"{}")
_weights("header nested 100,000 deep", DAMAGED, lambda _: _header('{"a":' * 100_000 + "1" + "}" * 100_000))
_weights(
    "tensor of 2^60 entries without data",
    DAMAGED,
    lambda _: _header('{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,0]}}'),
)
_weights(
    "two tensors on the same bytes",
    DAMAGED,
    lambda _: (
        _header("{" + ",".join(f'"{n}":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}' for n in "ab") + "}")
        + bytes(8)
    ),
)
_weights("weights cut off", DAMAGED, lambda data: data[:-100])
_weights("an empty weights file", DAMAGED, lambda _: b"")
_weights("an HTML page in place of weights", DAMAGED, lambda _: b"<!DOCTYPE html><title>404</title>")


@fault("a pickle in place of safetensors", "convert", "only pickled weights")
def _(bench: Bench) -> list[str]:
    model = bench.copy("dense")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    return convert(model, bench.inputs, bench.output)


def _index(name: str, file: str, answer: str) -> None:
    @fault(f"index that names {name}", "convert", answer)
    def _(bench: Bench) -> list[str]:
        model = bench.copy("dense")
        names = list(load_file(model / "model.safetensors"))
        (model / "model.safetensors").rename(model / "a.safetensors")
        (model / "b.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        entries = dict.fromkeys(names, "a.safetensors") | {"model.norm.weight": file}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
        return convert(model, bench.inputs, bench.output)


_index("`../b.safetensors`", "../b.safetensors", "a file outside the folder")
_index("`/etc/passwd`", "/etc/passwd", "a file outside the folder")
_index("`..`", "..", "a file outside the folder")
_index("a file with NUL in its name", "a\0.safetensors", "a file outside the folder")
_index("a file of 5,000 letters", "a" * 5000, "a file outside the folder")
_index("half a character", "\ud800", "is missing")
_index("a pickle", "b.bin", DAMAGED)
_index("a shard that is not there", "c.safetensors", "is missing")


def _config(name: str, answer: str, change: dict | Callable[[bytes], bytes], family: str = "llama") -> None:
    @fault(name, "convert", answer)
    def _(bench: Bench) -> list[str]:
        model = bench.copy("dense") if family == "llama" else tiny_checkpoint(bench.place / "dense", family)
        file = model / "config.json"
        if callable(change):
            file.write_bytes(change(file.read_bytes()))
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return convert(model, bench.inputs, bench.output)


NO_SUCH = "no model has that"
_config("config.json with 10^9 layers", NO_SUCH, {"num_hidden_layers": 10**9})
_config("config.json with 9,999 layers, weights with 4", "num_hidden_layers=9999", {"num_hidden_layers": 9999})
_config("config.json with -1 layers", "num_hidden_layers=-1", {"num_hidden_layers": -1})
_config("config.json with 10^9 labels", NO_SUCH, {"num_labels": 10**9})
_config("config.json with a width of 10^12", NO_SUCH, {"hidden_size": 10**12})
_config("config.json with a width of 10^6", "--model: ", {"hidden_size": 10**6, "intermediate_size": 10**6})
_config("config.json with a vocabulary of 10^15", NO_SUCH, {"vocab_size": 10**15})
_config("config.json with heads of 10^9", NO_SUCH, {"head_dim": 10**9})
_config("GPT-J with 10^8 positions", "masks and positions", {"n_positions": 10**8}, "gptj")
_config("GPT-Neo with 10^6 positions (squared in its mask)", "--model: ", {"max_position_embeddings": 10**6}, "gpt_neo")
_config("config.json of one number of 10,000 digits", "not valid JSON", lambda _: b'{"a": ' + b"9" * 10_000 + b"}")
_config("config.json nested 100,000 deep", "nested too deeply", lambda _: b"[" * 100_000)
_config("config.json that is not UTF-8", "not valid JSON", lambda data: data + b"\xff")
_config("config.json of 65 MiB", "more than 64 MiB", lambda _: b" " * (65 << 20))
_config("config.json with a word for a width", "--model: ", {"hidden_size": "wide"})
_config("config.json with a width of 0", "--model: ", {"hidden_size": 0})
_config("config.json that lists no architecture of ours", "architecture", {"architectures": ["os.system"]})


@fault("tokenizer_config.json that is no JSON", "convert", "tokenizer")
def _(bench: Bench) -> list[str]:
    model = bench.copy("dense")
    (model / "tokenizer_config.json").write_text("{")
    return convert(model, bench.inputs, bench.output)


@fault("the same, when no text is read", "convert", "tokenizer_config.json is not valid JSON")
def _(bench: Bench) -> list[str]:
    model = bench.copy("dense")
    (model / "tokenizer_config.json").write_text("{")
    return [*convert(model, bench.inputs, bench.output), "--split", "weights", "--gate", "average-key"]


def with_tokenizer_of_its_own(model: Path) -> Path:
    """A model whose tokenizer is code in its folder."""
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    (model / "tokenizer.json").unlink()
    (model / "evil.py").write_text("import os; os.system('touch owned')\nclass Evil: pass\n")
    return model


OWN_TOKENIZER = "tokenizer that asks to run code of its own"


@fault(OWN_TOKENIZER, "convert", "no usable tokenizer")
def _(bench: Bench) -> list[str]:
    return convert(with_tokenizer_of_its_own(bench.copy("dense")), bench.inputs, bench.output)


@fault(OWN_TOKENIZER, "export", "no usable tokenizer .* give --verify-tokens 0")
def _(bench: Bench) -> list[str]:
    model = with_tokenizer_of_its_own(bench.copy("converted"))
    return ["export", "--model", str(model), "--output", str(bench.output)]
