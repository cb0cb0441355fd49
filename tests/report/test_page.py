"""The HTML report: self-contained, escaped, and its pictures show what is there."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.modules import moduleformer

from emoe.cli.main import main
from emoe.report.inspect import describe
from emoe.report.observe import _binned, observe
from emoe.report.sections import _converted
from emoe.report.svg import Axis, Line, chart, mark

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


def test_one_text_is_not_each_of_several(converted_llama, text_file, tmp_path):
    for texts, said in (([str(text_file)], "64 tokens of"), ([str(text_file), "builtin"], "64 tokens each of")):
        output = tmp_path / "r.html"
        flags = [flag for text in texts for flag in ("--text", text)]
        assert main(["report", str(converted_llama), "--html", str(output), "--tokens", "64", *flags, "--quiet"]) == 0
        assert f"{said} {', '.join(texts)}." in output.read_text()


def test_colours_have_a_scale(page):
    """Below each pair of pictures of co-activation, and below that of load."""
    scales = re.findall(r'<div class="scale"><span>(.*?)</span><i></i><span>(.*?)</span>', page.read_text())
    assert len(scales) == 3 + 1
    assert scales[-1][0] == "0"
    assert re.fullmatch(r"\d\.\d × fair share( and more)?", scales[-1][1])


def test_a_gate_of_the_weights_alone_stores_nothing(converted_llama):
    found = describe(converted_llama)
    assert _converted(found)["gate"].endswith(f"; {found['gate_entries']:,} numbers")
    assert _converted(found | {"gate_entries": 0})["gate"].endswith("; nothing is stored for it")


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


def test_a_chart_says_what_it_draws():
    lines = [Line("ours <b>", [(2.0, 30.0), (0.0, 70.0), (1.0, 20.0)]), Line("theirs", [(1.0, 5.0)])]
    text = chart(lines, "layer", "experts used, %", level=14.79)
    told = "ours &lt;b&gt;: 70 at 0 to 30 at 2, between 20 and 70; theirs: 5 at 1; dashed: 14.79."
    assert f'role="img" aria-label="Chart of experts used, % over layer. {told}"' in text
    assert "rotate(" not in text


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(25.0, 77.0), (14.79, 50.3), (0.8, 1.05), (1.0, 6094.0), (1.0, 51420.0)])
def test_an_axis_has_marks_enough_and_short_ones(low, high, log):
    axis = Axis([low, high], 0, 100, log)
    marks = axis.marks()
    assert 3 <= len(marks) <= 8
    assert all(0 <= axis.place(value) <= 100 for value in marks)
    assert max(len(mark(value)) for value in marks) <= 5


@pytest.mark.parametrize("level", [2.0, 0.0, -1.0, float("inf"), float("nan"), None])
@pytest.mark.parametrize("log", [False, True])
def test_charts_take_any_numbers(log, level):
    points = [(0.0, 0.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 1e-300), (4.0, 5.0), (5.0, -1.0)]
    text = chart([Line(EVIL, points)], EVIL, EVIL, log=log, level=level)
    assert "nan" not in text.replace(EVIL, "")
    assert "<script" not in text
    assert chart([Line("none", [(0.0, float("nan"))])], "x", "y") == ""
    assert "circle" in chart([Line("one point", [(1.0, 1.0)])], "x", "y", log=log)
    far = [1e308, -1e308, 1e300, 5e-324, 1e-99, 1e99, 1.0, 1.0 + 2**-52]
    for x, y in itertools.product(far, far):  # alone and two by two
        chart([Line("one", [(x, y)])], "x", "y", log=log, level=level)
        chart([Line("two", [(x, y), (y, x)])], "x", "y", log=log)


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


WATCHING = ("no usable tokenizer", "is not what was written")
"""Complaints of watching experts alone: --tokens 0 does without."""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "holds no converted checkpoint"),
        (lambda f: (f / "emoe_report.json").write_text('{"model": 3}'), "emoe_report.json: "),
        (lambda f: (f / "frontier.json").write_text('{"cells": [{}]}'), "frontier.json: "),
        (lambda f: (f / "emoe_recover.json").write_text('{"dense": []}'), "emoe_recover.json: steps: "),
        (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
        (lambda f: _flip(next(f.glob("model-*.safetensors"))), "is not what was written"),
    ],
)
def test_bad_input_is_one_line(change, complaint, converted_llama, tmp_path, capsys):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "model"))
    change(folder)
    tokens = "64" if complaint in WATCHING else "0"
    arguments = ["report", str(folder), "--html", str(tmp_path / "r.html"), "--tokens", tokens, "--quiet"]
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]
    assert len(error) == 1
    assert complaint in error[0]
    assert not (tmp_path / "r.html").exists()
    if complaint in WATCHING:
        assert "--tokens 0" in error[0]
        assert write(tmp_path, folder) == 0


def test_without_a_tokenizer_the_rest_is_shown(converted_llama, tmp_path, capsys):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert main(["report", str(folder), "--html", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert f"note: no usable tokenizer in {folder} (there is none); no pictures of experts on text" in said
    assert "<h2>Quality" in (tmp_path / "r.html").read_text()


def write(folder: Path, *models: Path, tokens: int = 0) -> int:
    flags = ["--html", str(folder / "r.html"), "--tokens", str(tokens), "--quiet"]
    return main(["report", *map(str, models), *flags])


def test_models_after_surgery(converted_llama, tmp_path, capsys):
    """Said as they are; their experts are not watched, and the line that says so names the way out."""
    common = ["--model", str(converted_llama), "--quiet", "--output"]
    assert main(["extend", *common, str(tmp_path / "big"), "--experts", "2"]) == 0
    assert main(["prune", *common, str(tmp_path / "small"), "--method", "random", "--keep", "0.5"]) == 0
    groups = json.loads((tmp_path / "small" / "config.json").read_text())["emoe_groups"]
    assert write(tmp_path, tmp_path / "big", tmp_path / "small") == 0
    text = (tmp_path / "r.html").read_text()
    assert "8 + 2, 8 + 2, 8 + 2, 8 + 2 by layer, of 6 neurons; a token gets 3 on average, and of those behind" in text
    assert f"<dd>{', '.join(str(group[0]) for group in groups)} by layer, of 6 neurons; a token gets" in text
    assert "none of them new" not in text
    assert re.search(r"<dt>history 1</dt><dd>extend; 2 ffn experts a layer; ", text)
    assert re.search(r"<dt>history 1</dt><dd>prune; method random, keep 0.5", text)
    assert write(tmp_path, converted_llama) == 0
    assert "none of them new" in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    for name in ("big", "small"):
        assert write(tmp_path, tmp_path / name, tokens=64) == 2
        assert (
            "experts taken, added or copied, whose experts cannot be watched; add --tokens 0" in capsys.readouterr().err
        )


def test_a_frontier_alone(tmp_path):
    """It has a heading, and large numbers without powers of ten."""
    cell = {"name": "ours", "wanted": 0.5, "active": 0.5, "experts": 8, "domains": {"a": {"value": 9, "ratio": 12348}}}
    grid = {"model": "llama", "measure": "perplexity", "dense": {"a": 6.0}, "tokens": {"a": 64}, "cells": [cell]}
    (tmp_path / "frontier.json").write_text(json.dumps(grid))
    assert write(tmp_path, tmp_path) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("<h1>") == 1
    assert "<td>12,348 (50%)</td>" in text


def test_a_moduleformer(tmp_path, capsys):
    model = moduleformer(tmp_path / "model", "linear")
    assert write(tmp_path, model) == 0
    text = (tmp_path / "r.html").read_text()
    assert "model, a ModuleFormer" in text
    assert "<dt>ffn experts</dt><dd>8, 8, 8; 3 a token</dd>" in text
    assert write(tmp_path, model, tokens=64) == 2
    assert "is a ModuleFormer, whose experts cannot be watched; add --tokens 0" in capsys.readouterr().err
    assert main(["report", str(model), "--html", str(tmp_path / "again.html")]) == 0
    assert "is a ModuleFormer: no pictures of experts on text" in capsys.readouterr().out
    assert (tmp_path / "again.html").read_text() == text


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
