"""The look inside counts what the model does, goes on where it was, and writes a page that runs nobody's code."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
import transformers
from support.tiny import tiny_checkpoint

import emoe
from emoe.analysis.divergence import distributions, jensen_shannon, kullback_leibler, specialisation
from emoe.checkpoint.digests import write_digests
from emoe.cli.main import main
from emoe.report.usage import HOW, layer_ticks, signed, visible


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two texts that differ: words in order, and single letters."""
    folder = tmp_path_factory.mktemp("domains")
    (folder / "words.txt").write_text("which neurons fire together and what never meets we keep apart " * 300)
    (folder / "letters.txt").write_text("a b c d <script>alert(1)</script> e f g h i " * 500)
    return [f"words={folder / 'words.txt'}", f"letters={folder / 'letters.txt'}"]


@pytest.fixture
def flags(converted_llama, domains, tmp_path):
    return [
        *("analyze", "--model", str(converted_llama), "--domains", *domains, "--output", str(tmp_path / "report")),
        *("--tokens", "2048", "--sequence-length", "64", "--knock-out", "2", "--knock-out-tokens", "128", "--quiet"),
    ]


def report_of(folder) -> dict:
    return json.loads((folder / "usage.json").read_text())


def count(total_E, router, arguments, routing) -> None:
    total_E += torch.bincount(routing.experts_NK.flatten() + 1, minlength=9)[1:]


def test_what_it_says_is_what_the_model_does(flags, converted_llama, domains, tmp_path):
    assert main(flags) == 0
    report = report_of(tmp_path / "report")
    from emoe.surgery.usage import read_blocks

    model = transformers.AutoModelForCausalLM.from_pretrained(converted_llama).eval()
    for item in domains:
        name, _, path = item.partition("=")
        tokens = read_blocks(converted_llama, [path], length=64, tokens=2048, seed=0, flag="--domains")
        counts = {layer: torch.zeros(8) for layer in model.sparse_ffns()}
        hooks = [
            ffn.router.register_forward_hook(partial(count, counts[layer]))
            for layer, ffn in model.sparse_ffns().items()
        ]
        with torch.no_grad():
            loss = sum(model(row[None], labels=row[None]).loss.item() for row in tokens) / len(tokens)
        for hook in hooks:
            hook.remove()
        assert report["domains"][name]["tokens"] == tokens.numel()
        assert report["domains"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        for row in report["sets"]:
            found = torch.tensor(row["frequency"][name])
            torch.testing.assert_close(found, counts[row["layer"]] / tokens.numel(), rtol=1e-3, atol=2e-3)
            assert sum(row["energy"][name]) == pytest.approx(1.0, rel=1e-4)
    for row in report["knock_out"]:
        assert all(abs(change) < 5 for change in row["change"].values())
    assert any(change != 0 for row in report["knock_out"] for change in row["change"].values())
    assert 0 <= report["neurons"]["layers"][0]["kept"] <= 1


def test_the_page_is_one_file_and_escaped(flags, tmp_path):
    assert main(flags) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/png;base64,") == 2
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        *("index.html", "usage.json", "frequencies.csv", "divergence-ffn.png", "usage-ffn.png")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_the_page_says_how(flags, domains, tmp_path):
    """Settings as on the command line; of two texts that are one no divergence has a sign."""
    twice = [*flags, "--domains", domains[0].replace("words=", "again=")]
    assert main(twice) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    shown = dict(re.findall(r'<td><code>(--[\w-]+)</code></td><td class="text">(.*?)</td>', page))
    told = {"--tokens": "2048", "--seed": "0", "--energies": "yes", "--knock-out": "2"}
    assert shown | told == shown
    assert sorted(shown["--domains"].split(", ")) == sorted([*domains, twice[-1]])
    assert "--top-k" not in shown
    assert "{'" not in page
    assert not re.search(r"-0\.0+<", page)
    assert " ".join(HOW.replace("'", "&#39;").split()) in " ".join(page.split())


def test_ends_of_lines_are_seen():
    assert visible(" a\t\r\n\n") == " a⇥␍↵↵"


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (2, [0, 1]), (30, list(range(0, 30, 3)))])
def test_a_heat_map_names_layers(count, places):
    """By their numbers in the model, not in the picture."""
    rows = [{"layer": 20 + 2 * place} for place in range(count)]
    assert layer_ticks(rows) == (places, [20 + 2 * place for place in places])


@pytest.mark.parametrize(("change", "told"), [(-4e-9, "0.00000"), (4e-9, "0.00000"), (-0.00012, "-0.00012")])
def test_what_rounds_to_nothing_has_no_sign(change, told):
    assert signed(change) == told


@pytest.mark.parametrize("cut", [12, 19])  # in the second domain; at the first module that is knocked out
def test_resumed_equals_undisturbed(cut, flags, tmp_path, monkeypatch):
    """What was counted before the cut is neither counted again nor left out."""
    from emoe.analysis import analyze

    nats, calls = analyze._Analysis._nats, []

    def counted(self, part_BT):
        calls.append(part_BT)
        if len(calls) == power_cut:
            raise RuntimeError("power cut")
        return nats(self, part_BT)

    monkeypatch.setattr(analyze._Analysis, "_nats", counted)
    power_cut = None
    assert main(flags) == 0
    undisturbed, every = report_of(tmp_path / "report"), len(calls)
    again = [flag if flag != str(tmp_path / "report") else str(tmp_path / "again") for flag in flags]
    calls.clear()
    power_cut = cut
    with pytest.raises(RuntimeError, match="power cut"):
        main([*again, "--checkpoint-seconds", "0"])
    assert not (tmp_path / "again").exists()
    calls.clear()
    power_cut = None
    assert main([*again, "--resume", "--checkpoint-seconds", "0"]) == 0
    assert len(calls) == every - (cut - 1)
    assert report_of(tmp_path / "again") == undisturbed
    assert main([*again, "--resume", "--seed", "1", "--overwrite"]) == 0


@pytest.mark.parametrize("changed", ["--model", "--domains words", "seed"])
def test_other_sources_are_not_gone_on_with(changed, flags, converted_llama, domains, tmp_path, monkeypatch, capsys):
    """The names stay, what they name does not: sums of both would be mixed."""
    from emoe.analysis import analyze

    model, text = tmp_path / "model", tmp_path / "words.txt"
    shutil.copytree(converted_llama, model)
    shutil.copyfile(domains[0].partition("=")[2], text)
    flags = [*flags, "--model", str(model), "--domains", f"words={text}"]
    flags = [flag for flag in flags if flag != domains[0]]
    monkeypatch.setattr(analyze._Analysis, "report", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(flags)
    monkeypatch.undo()
    if changed == "--model":
        weights = next(model.glob("*.safetensors"))
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        write_digests(model)
    elif changed == "--domains words":
        text.write_text("we keep apart what never meets " * 600)
    else:
        flags += ["--seed", "1"]
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 2
    said = "(seed: 0, now 1); use the same ones" if changed == "seed" else f"what {changed} names has changed since"
    assert said in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0


def test_divergences():
    p_CE = distributions(torch.tensor([[8, 0, 0, 8], [8, 0, 0, 8], [0, 8, 8, 0]]))
    kl, js = kullback_leibler(p_CE), jensen_shannon(p_CE)
    assert kl[0, 1].abs() < 1e-12
    assert kl[0, 2] == pytest.approx((p_CE[0] * (p_CE[0] / p_CE[2]).log()).sum().item())
    torch.testing.assert_close(js, js.T)
    assert 0 < js[0, 2] < torch.tensor(2.0).log()
    told_E, information_E = specialisation(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(told_E, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64) * torch.tensor(2.0).log())
    assert information_E.sum() == pytest.approx(0.5 * torch.tensor(2.0).log().item())


@pytest.mark.parametrize("modules", [7, 11, 64])
def test_domains_that_are_alike_have_no_negative_divergence(modules):
    """Rounding takes sums of terms that cancel below 0."""
    for first in range(1, 8):
        counts_CE = torch.arange(first, first + modules).square() * (1 + 1e-9 * torch.arange(3)[:, None])
        for found in (kullback_leibler, jensen_shannon, lambda p_CE: torch.stack(specialisation(p_CE))):
            assert not found(distributions(counts_CE)).signbit().any()


def test_an_encoder_has_no_losses(flags, settings, tmp_path):
    """It sees what it would have to predict."""
    dense = tiny_checkpoint(tmp_path / "dense", "bert")
    emoe.convert(str(dense), output=tmp_path / "bert", **settings)
    assert main([*[flag for flag in flags if flag != "--quiet"], "--model", str(tmp_path / "bert")]) == 0
    report = report_of(tmp_path / "report")
    assert {row["loss"] for row in report["domains"].values()} == {None}
    assert report["knock_out"] == []
    assert report["notes"] == ["an encoder predicts no next token: no losses and no knock-outs"]
    assert report["notes"][0] in (tmp_path / "report" / "index.html").read_text()
    assert sum(report["sets"][0]["frequency"]["words"]) > 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--output", __file__], f"--output: {__file__} is a file; choose another name"),
        (["--domains", "words"], "'words' is not NAME=TEXT"),
        (["--domains", "letters=builtin"], "the name 'letters' is given twice"),
        (["--top-k", "9"], "--top-k: 9 must lie between 1 and the model's 8 experts"),
    ],
)
def test_bad_input(change, complaint, flags, capsys):
    assert main([*flags, *change]) == 2
    assert complaint in capsys.readouterr().err


def test_too_little_text(flags, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a few words")
    assert main([*flags, "--domains", f"short={tmp_path / 'short.txt'}"]) == 2
    assert "short.txt is empty or shorter than one block" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_sums_outlive_a_failure(flags, tmp_path, monkeypatch, capsys):
    """Of the first domain, when there is trouble in the second; and the next call does not throw them away."""
    from emoe.analysis import analyze

    domain = analyze._Analysis.domain
    broken = lambda self, name: domain(self, name) if name == "words" else 1 / 0  # noqa: E731
    monkeypatch.setattr(analyze._Analysis, "domain", broken)
    with pytest.raises(ZeroDivisionError):
        main(flags)
    sums = tmp_path / ".report.emoe-analysis" / "0.safetensors"
    assert sums.is_file()
    assert main(flags) == 2
    assert "an unfinished analysis lies in" in capsys.readouterr().err
    assert sums.is_file()
    monkeypatch.undo()
    assert main([*flags, "--overwrite"]) == 0
    assert not sums.exists()
