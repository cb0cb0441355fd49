"""The HTML report: self-contained, escaped, and its pictures show what is there."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emoe.cli.main import main
from emoe.report.observe import _binned, observe
from emoe.report.svg import Line, chart

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
VOID = {"meta", "img", "br"}


class Balanced(html.parser.HTMLParser):
    """Fails on tags that do not match; collects what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.sources += [found[key] for key in ("src", "href", "srcset", "action") if key in found]
        assert not [name for name in found if name.startswith("on")], found
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(path: Path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def hostile(converted_llama, tmp_path_factory):
    """A converted checkpoint and a frontier in it, every name of which is an attack."""
    folder = Path(shutil.copytree(converted_llama, tmp_path_factory.mktemp("report") / "model<b>"))
    report = json.loads((folder / "emoe_report.json").read_text())
    report["quality"]["domains"] = {EVIL: {**report["quality"], "domains": None}}
    (folder / "emoe_report.json").write_text(json.dumps(report | {"model": EVIL.replace("/", "")}))
    config = json.loads((folder / "config.json").read_text())
    config["emoe_provenance"] |= {"source": EVIL, "emoe_version": EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    cell = {"name": EVIL, "wanted": 0.5, "active": 0.5, "experts": 8, "domains": {EVIL: {"value": 9.0, "ratio": 1.5}}}
    grid = {"model": EVIL, "measure": "perplexity", "dense": {EVIL: 6.0}, "tokens": {EVIL: 64}}
    (folder / "frontier.json").write_text(json.dumps(grid | {"cells": [cell, cell | {"wanted": 0.25, "active": 0.25}]}))
    return folder


@pytest.fixture(scope="module")
def page(hostile, text_file):
    output = hostile.parent / "report.html"
    texts = ["--text", str(text_file), "--text", "builtin"]
    assert main(["report", str(hostile), "--html", str(output), "--tokens", "256", *texts, "--quiet"]) == 0
    return output


def test_nothing_is_fetched_or_run(page):
    found = parsed(page)
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_it_says_what_there_is(page):
    text = page.read_text(encoding="utf-8")
    for heading in ("Quality", "The modules", "Expert load", "Who works on what", "Frontier of"):
        assert f"<h2>{heading}" in text
    assert len(re.findall("data:image/png", text)) == 2 * 3 + 1
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_numbers_are_those_of_the_report(page, hostile):
    quality = json.loads((hostile / "emoe_report.json").read_text())["quality"]
    text = page.read_text(encoding="utf-8")
    for row in quality["rows"]:
        assert f"<td>{row['value']:.4g}</td>" in text


def test_usage_is_what_the_loaded_model_chooses(converted_llama, text_file):
    """Streamed a layer at a time, the experts chosen are those of the whole model in transformers."""
    import transformers
    from transformers import AutoTokenizer

    from emoe.calibration.text import load_blocks

    seen = observe(converted_llama, [str(text_file)], 256, lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(converted_llama)
    length = seen.tokens // (seen.tokens // 128)
    options = {"calibration_tokens": 256, "held_out_tokens": 0, "seed": 0}
    tokens = load_blocks([str(text_file)], tokenizer, length=length, **options).calibration
    model = transformers.AutoModelForCausalLM.from_pretrained(converted_llama).eval()
    chosen = {}
    for name, ffn in model.sparse_ffns().items():
        ffn.router.register_forward_hook(lambda _, __, routing, name=name: chosen.update({name: routing.experts_NK}))
    with torch.no_grad():
        model(tokens)
    assert len(chosen) == len(seen.layers)
    for use_E, experts_NK in zip(seen.usage[str(text_file)], chosen.values(), strict=True):
        counts = torch.bincount(experts_NK[experts_NK >= 0], minlength=8) / tokens.numel()
        np.testing.assert_allclose(use_E, counts.numpy(), atol=0.02)  # another order of sums may tip a close choice


def test_the_picture_shows_modules():
    """Neurons of one block that fire together make a bright square; independent ones make none."""
    generator = torch.Generator().manual_seed(0)
    on_NE = torch.rand(2000, 4, generator=generator) < 0.2
    modular = on_NE.repeat_interleave(8, dim=1) & (torch.rand(2000, 32, generator=generator) < 0.9)
    found = _binned(modular, 4)
    assert found.diagonal().min() > 0.6
    assert found[~torch.eye(4, dtype=torch.bool)].abs().max() < 0.1
    noise = torch.rand(2000, 32, generator=generator) < torch.linspace(0.05, 0.9, 32)  # busy and idle, but independent
    assert _binned(noise, 4).abs().max() < 0.05
    pairs = torch.corrcoef(modular.float().T)
    wanted = (pairs[:8, :8].sum() - 8) / 56
    assert found[0, 0].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_neurons_that_never_or_always_fire_are_no_numbers_to_fear():
    still = torch.zeros(10, 6, dtype=torch.bool)
    still[:, :3] = True
    assert _binned(still, 3).isfinite().all()


@pytest.mark.parametrize("log", [False, True])
def test_charts_take_any_numbers(log):
    points = [(0.0, 0.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 1e-300), (4.0, 5.0), (5.0, -1.0)]
    text = chart([Line(EVIL, points)], EVIL, EVIL, log=log, level=2.0)
    assert "nan" not in text.replace(EVIL, "")
    assert "<script" not in text
    assert chart([Line("none", [(0.0, float("nan"))])], "x", "y") == ""
    assert "circle" in chart([Line("one point", [(1.0, 1.0)])], "x", "y", log=log)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "holds no converted checkpoint"),
        (lambda f: (f / "emoe_report.json").write_text('{"model": 3}'), "emoe_report.json: "),
        (lambda f: (f / "frontier.json").write_text('{"cells": [{}]}'), "frontier.json: "),
        (lambda f: (f / "emoe_recover.json").write_text('{"dense": []}'), "emoe_recover.json is not what"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    ],
)
def test_bad_input_is_one_line(change, complaint, converted_llama, tmp_path, capsys):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "model"))
    change(folder)
    tokens = "64" if complaint == "no usable tokenizer" else "0"
    arguments = ["report", str(folder), "--html", str(tmp_path / "r.html"), "--tokens", tokens, "--quiet"]
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]
    assert len(error) == 1
    assert complaint in error[0]
    assert not (tmp_path / "r.html").exists()


def test_runs_need_the_comparison(tmp_path, capsys, monkeypatch):
    (tmp_path / "vanilla" / "seed-0").mkdir(parents=True)
    (tmp_path / "vanilla" / "seed-0" / "run.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(tmp_path / "vanilla"), "--html", str(tmp_path / "r.html")]) == 2
    assert "cannot compare runs" in capsys.readouterr().err


def test_it_takes_bounded_work(converted_llama, tmp_path, capsys):
    arguments = ["report", str(converted_llama), "--html", str(tmp_path / "r.html"), "--tokens", "9999999"]
    assert main(arguments) == 2
    assert "--tokens: 9999999 of 2 texts" in capsys.readouterr().err
