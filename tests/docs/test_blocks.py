"""Every block of code in README.md and docs/ runs, on a tiny model that stands in for the real ones.

A block that cannot run here is preceded by ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.tiny import tiny_checkpoint

from emoe.cli.main import main
from emoe.config import ConvertConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")]
REAL = ("llama2-7b", "smollm2-135m", "all-minilm-l6-v2")
SHORTER = {
    "convert": {"--calibration-tokens": "2048", "--held-out-tokens": "64", "--sequence-length": "64"},
    "frontier": {"--calibration-tokens": "2048", "--held-out-tokens": "64", "--sequence-length": "64"}
    | {"--active": "0.5", "--layers": "2,3"},
    "recover": {"--steps": "1", "--tokens-per-step": "64", "--held-out-tokens": "64", "--sequence-length": "64"},
    "report": {"--tokens": "64"},
    "analyze": {"--tokens": "64", "--sequence-length": "64", "--knock-out": "1", "--knock-out-tokens": "64"},
    "prune": {"--tokens": "64"},
    "extend": {"--tokens": "64", "--sequence-length": "32"},
    "tune": {"--steps": "1", "--tokens-per-step": "64", "--held-out-tokens": "64", "--sequence-length": "64"},
    "export": {"--verify-tokens": "64"},
}
"""Flags that a block's commands get in addition, or instead, so that a test takes seconds."""


@dataclass
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    excused: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in re.finditer(r"(<!-- not run: .+? -->\s*)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(2)].count("\n") + 1
        found.append(Block(page, line, match[2], match[3], bool(match[1])))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_file):
    """A folder in which the pages' commands find what they speak of."""
    folder = tmp_path_factory.mktemp("docs")
    tiny_checkpoint(folder / "my-llama", "llama", intermediate_size=128)
    for name in ("text.txt", "code.txt"):
        shutil.copy(text_file, folder / name)
    words = random.Random(0).choices(
        ["zuerst", "wurde", "gesagt", "dass", "niemand", "etwas", "davon", "wisse"], k=4000
    )
    (folder / "german.txt").write_text(" ".join(words), encoding="utf-8")
    main(
        ["convert", "--model", str(folder / "my-llama"), "--output", str(folder / "out"), "--quiet", *short("convert")]
    )
    return folder


def short(verb: str) -> list[str]:
    return [part for pair in SHORTER.get(verb, {}).items() for part in pair]


def stand_in(words: list[str]) -> list[str]:
    """The command with the tiny model for real ones, and less of everything."""
    verb, words = words[0], ["./my-llama" if w in REAL and words[0] != "estimate" else w for w in words]
    words = [w.replace("smollm2-135m-emoe", "my-llama-emoe") for w in words]
    if "--layers" in words and words[words.index("--layers") + 1] == "16:32:4":  # of Llama-2-7B
        words[words.index("--layers") + 1] = "0:4:2"
    for flag, value in SHORTER.get(verb, {}).items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def run_line(line: str, place: Path) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "emoe":
        verb = words[1]
        output = Path(words[words.index("--output") + 1]) if "--output" in words else None
        if output and output.exists() and verb != "frontier":  # a page shows several ways to the same folder
            shutil.rmtree(output)
        assert main(stand_in(words[1:])) == 0, line
    elif words[:2] == ["bash", words[1]] and words[1].startswith("scripts/"):
        assert (ROOT / words[1]).is_file(), line  # these make an environment of their own; CI runs them
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).is_file(), line
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
    else:
        pytest.fail(f"no test knows how to run: {line}")


def run_python(text: str, place: Path, monkeypatch) -> None:
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, *arguments, **options):
        if str(name).startswith("allenai/"):
            olmoe = place / "olmoe"
            small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = transformers.OlmoeConfig(vocab_size=96, num_experts=4, num_key_value_heads=2, **small)
            transformers.OlmoeForCausalLM(config).save_pretrained(olmoe)
            name = olmoe
        return load(name, *arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    shutil.rmtree(place / "my-llama-emoe", ignore_errors=True)  # made by a command before
    exec(compile(text, "block", "exec", dont_inherit=True), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks(page, place, monkeypatch):
    """In order, in one folder: a later block may use what an earlier one has made."""
    monkeypatch.chdir(place)
    for block in blocks(page):
        if block.excused:
            continue
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                for command in re.split(r";(?=\s)", line.split(" #")[0]):
                    run_line(command, place)
        elif block.language == "python":
            run_python(block.text, place, monkeypatch)
        elif block.language == "yaml":
            for way in yaml.safe_load(block.text).values():
                assert not isinstance(way, dict) or set(way) <= {*ConvertConfig.model_fields, "shared"}, str(block)
        else:
            assert block.language in ("", "text", "json"), f"{block}: no test runs {block.language}"
            assert not re.search(r"^(emoe|python|bash) ", block.text, re.MULTILINE), f"{block}: nothing runs this"


def test_blocks_are_found():
    """The tests above must have something to run."""
    assert len(blocks(ROOT / "README.md")) >= 4
    assert sum(len(blocks(page)) for page in PAGES) >= 15
