"""Faults as data: what is done to a model, a file or the disk, and what the program must say to it.

`FAULTS` holds all of them, those of hostile_checkpoints.py first.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from support.bench import FAULTS, MEMORY, SHORT, Bench, convert, fault, make_inputs
from support.drill import Verb
from support.hostile_checkpoints import DAMAGED, NO_SUCH
from support.scripts import SCRIPTS
from support.tiny import TEXT

__all__ = ["FAULTS", "MEMORY", "TASKS", "make_inputs"]

# -- hostile settings and text ----------------------------------------------------------------------------------------


def _yaml(name: str, answer: str, text: str | bytes) -> None:
    def written(bench: Bench, flag: str) -> list[str]:
        path = bench.place / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [flag, str(path)]

    @fault(name, "convert --config", answer)
    def _(bench: Bench) -> list[str]:
        return [*convert(bench.inputs["dense"], bench.inputs, bench.output), *written(bench, "--config")]

    @fault(name, "frontier --grid", answer)
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
    @fault(name, "convert --calibration", answer)
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

    @fault(name, verb, answer)
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


TASKS = {verb.name: verb.command for verb in Verb.read(SCRIPTS / "fault_drill.yaml")} | {
    "analyze": "analyze --model {converted} --output {output} --domains a={text} --tokens 64 --sequence-length 32",
    "report": "report {converted} --html {output} --tokens 0",
}
"""A short call of each verb that writes."""


def _call(verb: str, bench: Bench, output: Path) -> list[str]:
    return [part.format(**bench.inputs, output=output) for part in TASKS[verb].split()]


def _mounted(bench: Bench, options: str) -> Path:
    """A small file system of its own (root only)."""
    folder = bench.place / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    bench.undo.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


def _disk(verb: str) -> None:
    flag, grows = "--html" if verb == "report" else "--output", verb == "frontier"

    @fault("no file may pass 4 kB", verb, f"{flag}: cannot write .*; make room and ", RLIMIT_FSIZE=4_000)
    def _(bench: Bench) -> list[str]:
        return _call(verb, bench, bench.place / "grid" if grows else bench.output)

    @fault("a target that is in the way", verb, f"{flag}: .*(is a file|exists|is a folder)")
    def _(bench: Bench) -> list[str]:
        target = bench.place / "mine"
        target.mkdir() if verb == "report" else target.write_text("mine")
        return _call(verb, bench, target)

    @fault("a target in /proc", verb, f"{flag}: .*(not writable|cannot write|0 B free)")
    def _(bench: Bench) -> list[str]:
        return _call(verb, bench, Path("/proc/emoe-out"))

    @fault("a disk of 4 kB", verb, f"{flag}: .*(cannot write .*; make room and |B free)", mounts=True)
    def _(bench: Bench) -> list[str]:
        return _call(verb, bench, _mounted(bench, "size=4k") / "out")

    @fault("a disk that is read-only", verb, f"{flag}: .*(not writable|cannot write)", mounts=True)
    def _(bench: Bench) -> list[str]:
        return _call(verb, bench, _mounted(bench, "ro") / "out")


for _verb in ("convert", "export", "recover", "frontier", "prune", "extend", "tune", "finetune", "analyze", "report"):
    _disk(_verb)
