"""Faults as data: what is done to a model, a file or the disk, and what the program must say to it.

Each is tried in a process that may take 1.5 GiB beyond what it begins with: what is refused must be refused before the
memory for it is taken.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from support.labelled import write_task
from support.nursery import Nursery
from support.tiny import TEXT, tiny_checkpoint

from emoe.pretraining.text import PIECE

MEMORY = 3 << 29
SHORT = ["--experts", "8", "--calibration-tokens", "2048", "--held-out-tokens", "0", "--sequence-length", "64"]


ARCHITECTURE = {
    "model_type": "moduleformer",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "att_hidden": 8,
    "ffd_hidden": 16,
    "gating_size": 8,
    "n_att_experts": 4,
    "n_mlp_experts": 4,
}
"""Of the model that `emoe pretrain` begins with."""


def make_inputs(folder: Path, nursery: Nursery) -> dict[str, Path]:
    """A dense checkpoint, a converted one, two texts, a labelled task and a new model's architecture, by name."""
    folder.mkdir(parents=True)
    inputs = {
        "dense": tiny_checkpoint(folder / "dense"),
        "text": folder / "text.txt",
        "long_text": folder / "long.txt",
        "converted": folder / "converted",
        "task": write_task(folder / "task"),
        "architecture": folder / "architecture.yaml",
    }
    inputs["architecture"].write_text(yaml.safe_dump({"architecture": ARCHITECTURE}))
    inputs["text"].write_text(TEXT * 60)
    inputs["long_text"].write_text(TEXT * (4 * PIECE // len(TEXT)))  # pieces for training and one that is held out
    done = nursery.run(*convert(inputs["dense"], inputs, inputs["converted"]), "--held-out-tokens", 256)
    assert done.status == 0, done.text
    return inputs


def convert(model: Path, inputs: dict[str, Path], output: Path) -> list[str]:
    """Arguments of a short conversion."""
    return ["convert", "--model", str(model), "--output", str(output), "--calibration", str(inputs["text"]), *SHORT]


@dataclass
class Bench:
    """Where one fault is tried."""

    place: Path
    inputs: dict[str, Path]
    undo: ExitStack

    def copy(self, name: str) -> Path:
        """A copy of an input, to be damaged."""
        return Path(shutil.copytree(self.inputs[name], self.place / name))

    @property
    def output(self) -> Path:
        """What the run is told to write."""
        return self.place / "out"


@dataclass(frozen=True)
class Fault:
    """A fault and the answer that is right."""

    name: str
    verb: str
    arguments: Callable[[Bench], list[str]]
    """Does the damage; returns the command line."""
    answer: str | None
    """Regular expression of the one line that refuses it; None if it has to work."""
    limits: dict[str, int] = field(default_factory=dict)

    def run(self, nursery: Nursery, inputs: dict[str, Path], place: Path) -> Verdict:
        """Try it."""
        place.mkdir(parents=True)
        with ExitStack() as undo:
            bench = Bench(place, inputs, undo)
            arguments = self.arguments(bench)
            done = nursery.run(*arguments, memory=MEMORY, **self.limits)
            said = done.complaints[0].removeprefix("emoe: ") if done.complaints else done.text.strip()[-300:]
            if self.answer is None:
                survived = done.status == 0
                said = "done" if survived else said
            else:
                survived = done.refused and bool(re.search(self.answer, said)) and not bench.output.exists()
        said = re.sub(rf"{re.escape(str(place))}/|{re.escape(str(inputs['dense'].parent))}/", "", said)
        shutil.rmtree(place)
        return Verdict(self.name, self.verb, survived, said if len(said) < 200 else said[:200] + "…")


@dataclass(frozen=True)
class Verdict:
    """What came of a fault."""

    fault: str
    verb: str
    survived: bool
    said: str


FAULTS: list[Fault] = []


def _fault(name: str, verb: str, answer: str | None, **limits: int) -> Callable:
    def add(arguments: Callable[[Bench], list[str]]) -> Callable:
        FAULTS.append(Fault(name, verb, arguments, answer, limits))
        return arguments

    return add


# -- a hostile checkpoint ---------------------------------------------------------------------------------------------


def _weights(name: str, answer: str, content: Callable[[bytes], bytes]) -> None:
    @_fault(name, "convert", answer)
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


@_fault("a pickle in place of safetensors", "convert", "only pickled weights")
def _(bench: Bench) -> list[str]:
    model = bench.copy("dense")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    return convert(model, bench.inputs, bench.output)


def _index(name: str, file: str, answer: str) -> None:
    @_fault(f"index that names {name}", "convert", answer)
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
    @_fault(name, "convert", answer)
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


@_fault("tokenizer_config.json that is no JSON", "convert", "tokenizer")
def _(bench: Bench) -> list[str]:
    model = bench.copy("dense")
    (model / "tokenizer_config.json").write_text("{")
    return convert(model, bench.inputs, bench.output)


@_fault("the same, when no text is read", "convert", "tokenizer_config.json is not valid JSON")
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


@_fault(OWN_TOKENIZER, "convert", "no usable tokenizer")
def _(bench: Bench) -> list[str]:
    return convert(with_tokenizer_of_its_own(bench.copy("dense")), bench.inputs, bench.output)


@_fault(OWN_TOKENIZER, "export", "no usable tokenizer .* give --verify-tokens 0")
def _(bench: Bench) -> list[str]:
    model = with_tokenizer_of_its_own(bench.copy("converted"))
    return ["export", "--model", str(model), "--output", str(bench.output)]


# -- hostile settings and text ----------------------------------------------------------------------------------------


def _yaml(name: str, answer: str, text: str | bytes) -> None:
    def written(bench: Bench, flag: str) -> list[str]:
        path = bench.place / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [flag, str(path)]

    @_fault(name, "convert --config", answer)
    def _(bench: Bench) -> list[str]:
        return [*convert(bench.inputs["dense"], bench.inputs, bench.output), *written(bench, "--config")]

    @_fault(name, "frontier --grid", answer)
    def _(bench: Bench) -> list[str]:
        inputs = ["--model", str(bench.inputs["dense"]), "--output", str(bench.output)]
        return ["frontier", *inputs, *SHORT[:2], *written(bench, "--grid")]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
_yaml("YAML aliases for 3.5 billion values", "aliases", BOMB)
_yaml("YAML tag that calls a function", "not valid YAML", "experts: !!python/object/apply:os.system ['touch owned']\n")
_yaml("YAML nested 50,000 deep", "nested too deeply", "experts: " + "[" * 50_000)
_yaml("YAML with the 99th of month 99", "not valid YAML", "experts: 2001-99-99\n")
_yaml("YAML of 2 MiB", "more than 1 MiB", "#" * (2 << 20))
_yaml("YAML that is not UTF-8", "byte", b"experts: \xff\n")
_yaml("YAML that is a list", "must hold", "[1, 2]\n")


def _text(name: str, answer: str | None, file: str, content: bytes) -> None:
    @_fault(name, "convert --calibration", answer)
    def _(bench: Bench) -> list[str]:
        (bench.place / file).write_bytes(content)
        return convert(bench.inputs["dense"], bench.inputs | {"text": bench.place / file}, bench.output)


_text("one line of 10 MB", None, "text.txt", (TEXT.replace("\n", " ") * 60_000).encode()[: 10 << 20])
_text("10 MB without a space", None, "text.txt", b"model" * (2 << 20))
_text("text that is not UTF-8", "is not UTF-8 text", "text.txt", TEXT.encode() * 50 + b"caf\xe9 " * 99)
_text("JSON lines with halves of characters", None, "t.jsonl", b'{"text": "words \\ud800 and more of them"}\n' * 2000)
_text("JSON lines nested 100,000 deep", "line 1 is not", "t.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n")
_text("NUL bytes", "--calibration|--model|shorter", "text.txt", bytes(200))


# -- a damaged converted checkpoint -----------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _swap(first: Path, second: Path) -> None:
    """Give two shards each other's tensors under their own names, as a mix-up of two models of one shape would."""
    one, other = load_file(first), load_file(second)
    same = dict(zip(sorted(one), (other[name] for name in sorted(other)), strict=True))
    save_file(same, first, metadata={"format": "pt"})


def _shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one bit flipped in a shard": ("is not what was written", lambda f: _flip(_shard(f, 2))),
    "a shard with another's tensors": ("is not what was written", lambda f: _swap(_shard(f, 2), _shard(f, 3))),
    "a shard cut off": (f"not what was written|{DAMAGED}", lambda f: _shard(f, 2).write_bytes(b"\0" * 50)),
    "a shard missing": ("is missing", lambda f: _shard(f, 2).unlink()),
    "one bit flipped in the partition": ("not what was written|not .* equal parts", lambda f: _flip(_partition(f))),
    "nonsense for a partition": ("missing or damaged|not what", lambda f: _partition(f).write_bytes(b"nonsense")),
    "a config.json without provenance": ("emoe_provenance", lambda f: _without(f, "emoe_provenance")),
    "a config.json without its source": ("emoe_source", lambda f: _without(f, "emoe_source")),
    "a config.json with 10^9 experts": (NO_SUCH, lambda f: _without(f, "num_experts", 10**9)),
    "a config.json with an unknown gate": ("'nobody'", lambda f: _without(f, "emoe_gate", "nobody")),
    "an emoe_report.json of other fields": (
        "emoe_report.json: model",
        lambda f: (f / "emoe_report.json").write_text("{}"),
    ),
    "SHA256SUMS with a path in it": ("SHA256SUMS is damaged", lambda f: (f / "SHA256SUMS").write_text("0  /etc/x\n")),
}


HARMLESS = {
    ("a config.json with an unknown gate", "export"),
    *(("an emoe_report.json of other fields", verb) for verb in ("export", "recover")),
}
"""Damage that does not matter to a verb: the dense model has no gate, for one."""


def _partition(folder: Path) -> Path:
    return folder / "partition.safetensors"


def _without(folder: Path, key: str, value: object = None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop(key)
    (folder / "config.json").write_text(json.dumps(config | ({key: value} if value else {})))


def _damage(name: str, verb: str) -> None:
    answer, change = DAMAGES[name]

    @_fault(name, verb, answer)
    def _(bench: Bench) -> list[str]:
        model = bench.copy("converted")
        change(model)
        return {
            "export": ["export", "--model", str(model), "--output", str(bench.output)],
            "inspect --verify": ["inspect", str(model), "--verify"],
            "recover": ["recover", "--model", str(model), "--output", str(bench.output), "--steps", "1"],
        }[verb]


for _name in DAMAGES:
    for _verb in ("export", "inspect --verify", "recover"):
        if (_name, _verb) not in HARMLESS:
            _damage(_name, _verb)


# -- the disk ---------------------------------------------------------------------------------------------------------


def _verbs(bench: Bench, output: Path) -> dict[str, list[str]]:
    recover = [
        "--text",
        str(bench.inputs["text"]),
        "--steps",
        "2",
        "--checkpoint-steps",
        "1",
        "--tokens-per-step",
        "64",
    ]
    recover += ["--sequence-length", "64", "--held-out-tokens", "64", "--precision", "float32"]
    grid = ["--methods", "emoe", "--active", "0.5", "--calibration", str(bench.inputs["text"])]
    grid += ["--held-out-tokens", "64"]
    return {
        "convert": convert(bench.inputs["dense"], bench.inputs, output),
        "export": ["export", "--model", str(bench.inputs["converted"]), "--output", str(output)],
        "recover": ["recover", "--model", str(bench.inputs["converted"]), "--output", str(output), *recover],
        "frontier": ["frontier", "--model", str(bench.inputs["dense"]), "--output", str(output), *SHORT, *grid],
    }


def _mounted(bench: Bench, options: str) -> Path:
    """A small file system of its own (root only)."""
    folder = bench.place / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    bench.undo.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return done.returncode == 0


def _disk(verb: str) -> None:
    @_fault("no file may pass 16 kB", verb, "cannot write|File too large", RLIMIT_FSIZE=16_000)
    def _(bench: Bench) -> list[str]:
        return _verbs(bench, bench.output if verb != "frontier" else bench.place / "grid")[verb]

    @_fault("a target that is a file", verb, "--output: .*(is a file|exists)")
    def _(bench: Bench) -> list[str]:
        (bench.place / "file").write_text("mine")
        return _verbs(bench, bench.place / "file")[verb]

    @_fault("a target in /proc", verb, "--output: .*(not writable|cannot write|0 B free)")
    def _(bench: Bench) -> list[str]:
        return _verbs(bench, Path("/proc/emoe-out"))[verb]

    if can_mount():

        @_fault("a disk of 12 kB", verb, "cannot write|No space|KiB free")
        def _(bench: Bench) -> list[str]:
            return _verbs(bench, _mounted(bench, "size=12k") / "out")[verb]

        @_fault("a disk that is read-only", verb, "not writable|cannot write|Read-only")
        def _(bench: Bench) -> list[str]:
            return _verbs(bench, _mounted(bench, "ro") / "out")[verb]


for _verb in ("convert", "export", "recover", "frontier"):
    _disk(_verb)
