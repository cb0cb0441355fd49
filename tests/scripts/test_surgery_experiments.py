"""The experiments on surgery run from end to end on tiny models, and go on where they were."""

from __future__ import annotations

import json
import sys

import pytest
from support.modules import moduleformer
from support.scripts import SCRIPTS, script


@pytest.fixture
def texts(text_file, tmp_path):
    """Three domains of some ten thousand characters."""
    words = text_file.read_text() * 12
    found = {"one": words, "two": " ".join(reversed(words.split())), "three": words.upper().lower()[::-1]}
    for name, text in found.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return {name: str(tmp_path / f"{name}.txt") for name in found}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(name: str, *flags, **changes) -> dict:
        module = script(name)
        for key, value in changes.items():
            monkeypatch.setattr(module, key, value)
        output = tmp_path / f"{name}.json"
        arguments = [name, *map(str, flags), "--work", str(tmp_path / "work"), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        module.main()
        assert output.with_suffix(".png").stat().st_size > 10_000
        assert "| ---" not in output.with_suffix(".md").read_text()
        return json.loads(output.read_text())

    return call


STEPS = ("--steps", 2, "--tokens-per-step", 128, "--held-out-tokens", 128, "--sequence-length", 64)


def test_continual_learning(run, tiny_llama, texts):
    flags = ("--model", tiny_llama, "--split", 8, "--experts", 1, "--limit", 1, "--points", 1, *STEPS)
    flags += ("--old", f"one={texts['one']}", "--tasks", f"two={texts['two']}", f"three={texts['three']}")
    result = run("continual_learning", *flags, "--also", f"again={texts['one']}")
    assert [(row["arm"], row["task"]) for row in result["rows"]] == [
        (arm, task) for arm in ("new-modules", "lora", "all") for task in ("two", "three")
    ]
    trained = {row["arm"]: row["trained"] for row in result["rows"]}
    assert 0.5 < trained["lora"] / trained["new-modules"] < 2
    assert run("continual_learning", *flags, "--also", f"again={texts['one']}")["rows"] == result["rows"]


@pytest.mark.parametrize("kind", ["llama", "moduleformer"])
def test_specialise(kind, run, tiny_llama, texts, tmp_path):
    model = tiny_llama if kind == "llama" else moduleformer(tmp_path / "mf", "linear")
    domains = {"code": texts["one"], "english": texts["two"]}
    result = run(
        *("specialise", "--model", model, "--split", 8, "--top-k", 4, "--keep", 0.5, *STEPS, "--count-tokens", 128),
        DOMAINS=domains,
        solutions=lambda folder, problems: -1.0,
    )
    arms = [row["arm"] for row in result["rows"]]
    expected = ["f-p, max", "f-p, concentrated, max", "p-f, max", "f-p, sum", "f-p, concentrated, sum", "p-f, sum"]
    assert [arm for arm in arms if "f" in arm and "p" in arm and "," in arm] == expected
    assert ("magnitude" in arms) == (kind == "llama")
    sizes = {row["arm"]: row["parameters"] for row in result["rows"]}
    assert sizes["f-p, max"] == sizes["random"] < sizes["fine-tuned"]


def test_modularity(run, tiny_llama, texts):
    flags = ("--model", tiny_llama, "--split", 8, "--top-k", 3, "--calibration-tokens", 2048)
    domains = [f"{name}={path}" for name, path in texts.items()]
    result = run("modularity", *flags, "--domains", *domains, "--tokens", 512, "--sequence-length", 64)
    assert list(result["models"]) == ["coactivation", "random"]
    for facts in result["models"].values():
        assert len(facts["divergence"]["ffn"]["kl"]) == 3
        assert 0 < facts["information"]["experts"] < facts["information"]["neurons"]
