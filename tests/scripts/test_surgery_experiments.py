"""The experiments on surgery run from end to end on tiny models, and go on where they were."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from support.modules import moduleformer
from support.scripts import SCRIPTS, script

from emoe.conversion.workspace import Workspace
from emoe.pretraining.text import Domain, pieces


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
        script("stages")  # what the programs import by this name
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


@pytest.mark.parametrize("kind", ["llama", "moduleformer"])
def test_continual_learning(kind, run, tiny_llama, texts, tmp_path):
    model = tiny_llama if kind == "llama" else moduleformer(tmp_path / "mf", "linear")
    flags = ("--model", model, "--split", 8, "--experts", 1, "--limit", 1, "--points", 1, *STEPS)
    flags += ("--attention", 1) if kind == "moduleformer" else ()
    flags += ("--old", f"one={texts['one']}", "--tasks", f"two={texts['two']}", f"three={texts['three']}")
    flags += ("--also", f"again={texts['one']}")
    result = run("continual_learning", *flags)
    assert [(row["arm"], row["task"]) for row in result["rows"]] == [
        (arm, task) for arm in ("new-modules", "fitted-gates", "lora", "all") for task in ("two", "three")
    ]
    trained = {row["arm"]: row["trained"] for row in result["rows"]}
    assert 0.5 < trained["lora"] / trained["new-modules"] < 2
    reports = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "work").glob("*/emoe_tune.json")}
    for name, report in reports.items():
        if name.endswith("two"):  # the plot's origin is where the training says that it began
            found = {d: report["perplexity"][d]["before"] for d in result["base"]}
            assert found == pytest.approx(result["base"], rel=1e-4)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file() and p.suffix != ".json"}
    assert run("continual_learning", *flags, "--seeds", 0)["rows"] == result["rows"]
    assert written and all(p.stat().st_mtime_ns == when for p, when in written.items())  # nothing was trained again
    with pytest.raises(SystemExit, match=r"other settings \(steps: 2, now 3\)"):
        run("continual_learning", *flags, "--steps", 3)


def test_a_killed_conversion_is_gone_on_with(run, tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    stages = script("stages")
    settings = stages.settings_of(argparse.Namespace(work="a", seed=0), [tiny_llama])
    publish = Workspace.publish

    def killed(self):
        raise KeyboardInterrupt

    sizes = {"experts": 8, "calibration": [str(text_file)], "calibration_tokens": 2048, "sequence_length": 64}
    monkeypatch.setattr(Workspace, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        stages.Stages(tmp_path / "work", settings).converted(str(tiny_llama), **sizes)
    monkeypatch.setattr(Workspace, "publish", publish)
    folder = stages.Stages(tmp_path / "work", settings).converted(str(tiny_llama), **sizes)
    assert (folder / "config.json").is_file()


def test_another_model_is_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    stages = script("stages")
    found = [
        stages.settings_of(argparse.Namespace(seed=0), [m]) for m in (tiny_llama, moduleformer(tmp_path / "m", "mlp"))
    ]
    stages.Stages(tmp_path / "work", found[0])
    stages.Stages(tmp_path / "work", found[0])
    with pytest.raises(SystemExit, match="digests"):
        stages.Stages(tmp_path / "work", found[1])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "base.json").write_text("{}")
    with pytest.raises(SystemExit, match="something else"):
        stages.Stages(tmp_path / "old", found[0])


def test_text_is_held_out_as_in_pretraining(tmp_path, monkeypatch):
    """Of a text of numbered lines: nothing of what is measured on lies in what `emoe pretrain` reads, and any passage
    of it comes from all over."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    stages = script("stages")
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number:07}\n" for number in range(80_000)))
    stages.Stages(tmp_path / "work", {}).texts({"lines": str(path)})
    read = "".join(text for apart, text in pieces(Domain("other name", str(path)), 0.05) if not apart)
    held = (tmp_path / "work" / "held" / "lines.txt").read_text()
    lines = [line for line in held.splitlines() if len(line) == 12]
    assert len(lines) > 2000
    assert not any(line in read for line in lines[::50])
    first = [int(line.split()[1]) for line in lines[: len(lines) // 2]]
    assert min(first) < 20_000 and max(first) > 60_000
    trained = (tmp_path / "work" / "train" / "lines.txt").read_text()
    assert not set(lines) & set(trained.splitlines())


def test_what_was_pretrained_on_is_not_new(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    stages = script("stages")
    settings = {"corpus": ["fiction", "german", "own=a.txt"], "held_out_share": 0.05}
    report = tmp_path / "emoe_pretrain.json"
    report.write_text(json.dumps({"settings": settings}))
    stages.check_pretraining(tmp_path, {"french": "corpus:french"})
    for source in ("corpus:german", "a.txt"):
        with pytest.raises(SystemExit, match="was pre-trained on"):
            stages.check_pretraining(tmp_path, {"new": source})
    report.write_text(json.dumps({"settings": settings | {"held_out_share": 0.1}}))
    with pytest.raises(SystemExit, match=r"--held-out-share 0\.1"):
        stages.check_pretraining(tmp_path)


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
    rankings, orders = ("layer", "max", "sum"), ("f-p", "p-f")
    expected = [f"{arm}, {by}" for by in rankings for arm in ("f-p", "f-p, concentrated", "p-f")]
    expected += [f"{order}, {by}" for by in ("random", "layers-uniform", "layers-top") for order in orders]
    assert [arm for arm in arms if arm.startswith(orders) and not arm.endswith("magnitude")] == expected
    sizes = {row["arm"]: row["parameters"] for row in result["rows"]}
    assert sizes["f-p, layer"] == sizes["f-p, max"] == sizes["p-f, random"] < sizes["fine-tuned"]
    active = {(row["arm"], row["keep"]): round(row["active"], 3) for row in result["rows"]}
    pruned = {arm for arm in expected if "layers" not in arm}
    if kind == "llama":  # the half that is left of 8 experts, half of which are used
        assert active["start", 1.0] == active["fine-tuned", 1.0] == 0.5
        assert active["start, all on", 1.0] == active["fine-tuned, all on", 1.0] == 1
        assert {active[arm, 0.5] for arm in expected} == {0.25}
        assert all(active[f"{order}, magnitude", share] == share for order in orders for share in (0.5, 0.25))
    else:  # 2 of 6 attention experts and 3 of 8 of the FFN in each layer, and as many of those that are left
        layered = {arm for arm in pruned if not arm.endswith(("max", "sum"))}
        assert {active[arm, 0.5] for arm in layered} == {active["start", 1.0]} == {round(5 / 14, 3)}
        assert all(0 < active[arm, 0.5] <= active["start", 1.0] for arm in pruned - layered)  # fewer than K in a layer
        assert active["p-f, layers-top", 0.5] == active["f-p, layers-top", 0.5] == round(2 / 3 * 5 / 14, 3)
        assert not any("magnitude" in arm for arm in arms)


def test_modularity(run, tiny_llama, texts):
    flags = ("--model", tiny_llama, "--split", 8, "--top-k", 3, "--calibration-tokens", 2048)
    domains = [f"{name}={path}" for name, path in texts.items()]
    flags += ("--random-seeds", 0, 1)
    result = run("modularity", *flags, "--domains", *domains, "--tokens", 512, "--sequence-length", 64)
    assert list(result["models"]) == ["coactivation", "coactivation, refined", "random 0", "random 1"]
    for facts in result["models"].values():
        kl = facts["divergence"]["ffn"]["kl"]
        assert [[value > 1e-6 for value in row] for row in kl] == [[i != j for j in range(3)] for i in range(3)]
        assert 0 < facts["information"]["experts"] < facts["information"]["neurons"]
