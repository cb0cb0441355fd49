"""Each format holds what the converted model computes, as stock transformers reads it, and refuses what it cannot."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support.hostile_checkpoints import with_tokenizer_of_its_own
from support.routing import FIXED, KEY
from support.tiny import VOCAB, tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.processors import RobertaProcessing

import emoe
from emoe.cli.main import main
from emoe.errors import UserError
from emoe.exporting import dense, stock
from emoe.exporting.source import Source
from emoe.exporting.verify import _Sums, kl_divergence

TOKENS = torch.randint(5, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
BIASED = {"attention_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def logits(folder, **kwargs) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        return model(TOKENS).logits


EXACT = [
    ("granitemoe", "llama", {}, KEY),
    ("granitemoe", "llama", BIASED, KEY),  # biases in all four projections
    ("granitemoe", "qwen2", {}, KEY),  # and in three of them
    ("granitemoe", "mistral", {}, KEY),
    ("granitemoe", "llama", {"hidden_act": "gelu"}, KEY),
    ("gpt_oss", "llama", {}, FIXED),  # the default gate
    ("gpt_oss", "llama", {}, KEY),
    ("gpt_oss", "llama", {}, FIXED | {"compensate": True}),
    ("gpt_oss", "qwen2", {}, FIXED),
    ("gpt_oss", "mistral", {"sliding_window": 8}, FIXED),  # shorter than the text
    ("gpt_oss", "qwen2", WINDOW | {"max_window_layers": 2}, FIXED),  # the last two layers slide
    ("gpt_oss", "qwen2", WINDOW | {"max_window_layers": 4}, FIXED),  # a window that no layer has
    ("granitemoe", "qwen2", WINDOW | {"max_window_layers": 4}, KEY),
]


@pytest.mark.parametrize(("to", "family", "shape", "given"), EXACT)
def test_an_exact_format_is_exact(to, family, shape, given, converted, tmp_path):
    source = converted(family, shape, **given)
    report = emoe.export(source, tmp_path / "out", to, verify_tokens=256)
    comparison, imposed = report["comparisons"]
    assert comparison["kl"] < 1e-10
    assert comparison["agreement"] == 1.0
    assert imposed["reference"] == "the same, choosing as the export does"
    assert imposed["kl"] < 1e-10
    assert imposed["choices"] == 4 * comparison["tokens"]
    assert imposed["changed"] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == to
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=2e-4)
    # Fewer experts than the dense model has neurons for: were all of them on, these would differ.
    all_on = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    all_on.set_top_k(8)
    with torch.no_grad():
        assert (all_on(TOKENS).logits - logits(tmp_path / "out")).abs().max() > 0.1


NEAR = [
    ("qwen2_moe", "llama", {}, KEY),
    ("qwen2_moe", "llama", {}, KEY | {"layers": "1,3"}),
    ("qwen2_moe", "qwen2", {}, KEY | {"layers": "0"}),
    ("qwen2_moe", "llama", {}, KEY | {"shared_experts": 2, "top_k": 5}),
    ("qwen2_moe", "llama", {"hidden_act": "gelu"}, KEY),
    ("mixtral", "llama", {}, KEY),
    ("mixtral", "mistral", {"sliding_window": 8}, KEY),
]


@pytest.mark.parametrize(("to", "family", "shape", "given"), NEAR)
def test_a_near_format_is_near(to, family, shape, given, converted, tmp_path):
    source = converted(family, shape, **given)
    report = emoe.export(source, tmp_path / "out", to, approximate=to == "mixtral", verify_tokens=256)
    free, imposed = report["comparisons"]
    assert 1e-12 < imposed["kl"] < 1e-3
    assert imposed["kl"] <= free["kl"] < 1e-2  # one token that chooses the other of two near ties is 3e-3 of it
    assert free["agreement"] > 0.97
    assert imposed["margin"] < 1e-2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == to
    if "layers" in given:
        assert config["mlp_only_layers"] == [i for i in range(4) if str(i) not in given["layers"]]
    if "shared_experts" in given:
        assert (config["num_experts"], config["num_experts_per_tok"]) == (6, 3)
        assert config["shared_expert_intermediate_size"] == 16  # 6 neurons, filled up to 8


REFUSED = [
    ("granitemoe", "llama", {}, {"held_out_tokens": 0}, "--gate average-key"),
    ("granitemoe", "llama", {}, {"held_out_tokens": 0}, "--to gpt_oss"),
    ("gpt_oss", "llama", {}, {"held_out_tokens": 0}, "--routing top-k --allocation uniform, or accept.* --fix-k 3"),
    ("gpt_oss", "llama", {}, FIXED | {"gate": "representative"}, "not linear.*--gate discriminant"),
    ("gpt_oss", "llama", {}, FIXED | {"layers": "1,3"}, "2 of 4 layers are dense.*-key and use --to qwen2_moe"),
    ("gpt_oss", "llama", {}, KEY | {"layers": "1,3"}, "2 of 4 layers are dense.* experts; use --to qwen2_moe"),
    ("granitemoe", "llama", {}, {"layers": "1", "held_out_tokens": 0}, "3 of 4 layers are dense.*or .*--layers all"),
    ("qwen2_moe", "llama", {}, FIXED | {"layers": "1,3"}, "has a bias.* not; train other .*, or convert it again with"),
    ("granitemoe", "llama", {}, KEY | {"shared_experts": 1}, "1 experts are always chosen.*--shared-experts 0"),
    ("granitemoe", "llama", {}, KEY | {"compensate": True}, "--to gpt_oss.*without --compensate"),
    ("granitemoe", "mistral", {"sliding_window": 8}, KEY, "window"),
    ("granitemoe", "qwen2", WINDOW | {"max_window_layers": 2}, KEY, "window"),
    ("qwen2_moe", "llama", BIASED, KEY, "output has a bias"),
    ("mixtral", "qwen2", {}, KEY, "attention has biases"),
    ("mixtral", "llama", {}, KEY, "--approximate"),
    ("gpt_oss", "gpt2", {}, FIXED, "decoder of gpt2.*--to dense"),
    ("gpt_oss", "llama", {"mlp_bias": True}, FIXED, "FFN has biases"),
    ("gpt_oss", "llama", {"hidden_act": "gelu"}, FIXED, "activation is gelu, .*--to dense, .*--gate average-key and"),
    ("gpt_oss", "llama", {"hidden_act": "gelu"}, KEY, "activation is gelu, gpt_oss computes SiLU.*; use --to granite"),
    ("gguf", "gpt2", {}, FIXED, "1,024 positions"),
    ("gguf", "opt", {}, FIXED, "only llama.*--to dense"),
    ("gguf", "llama", {}, FIXED, "byte-level BPE.*--to dense"),  # the tiny tokenizer splits at spaces
]


@pytest.mark.parametrize(("to", "family", "shape", "given", "reason"), REFUSED)
def test_what_cannot_be_held_is_refused_with_the_way_out(to, family, shape, given, reason, converted, tmp_path, capsys):
    source = converted(family, shape, **given)
    flags = ["--model", str(source), "--to", to, "--output", str(tmp_path / "out"), "--verify-tokens", "0"]
    assert main(["export", *flags, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emoe: --to: ")
    assert len(error.splitlines()) == 1
    assert re.search(reason, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_not_there_is_told_before_anything_is_written(converted, tmp_path, capsys):
    flags = ["--model", str(converted(**KEY)), "--output", str(tmp_path / "out"), "--verify-text", "nothing.txt"]
    assert main(["export", *flags]) == 2
    assert capsys.readouterr().err.startswith("emoe: --verify-text: nothing.txt does not exist")


def test_nothing_but_the_export_speaks(converted, tmp_path):
    """Loading Qwen2-MoE without shared experts makes torch warn of tensors without elements."""
    flags = ["--model", str(converted(**KEY)), "--to", "qwen2_moe", "--output", str(tmp_path / "out"), "--quiet"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(["export", *flags, "--verify-tokens", "64"]) == 0
    assert not [str(warning.message) for warning in said if "zero-element" in str(warning.message)]


def test_fixing_k_is_measured_and_said(converted, tmp_path, capsys):
    """The default routing gives as many experts as a token needs; fixed, it is another model, and the card says so."""
    source = converted(held_out_tokens=0)
    arguments = ["export", "--model", str(source), "--to", "gpt_oss", "--fix-k", "3", "--verify-tokens", "512"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    fixed, native, _ = report["comparisons"]
    assert fixed["reference"] == "the converted model, 3 experts for every token"
    assert fixed["kl"] < 1e-10
    assert native["reference"] == "the converted model as it routes"
    assert native["kl"] > 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{native['kl']:.3g}" in card
    assert "threshold, budget sensitivity, 3 of 8" in card
    # The model itself was not changed by being measured.
    again = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert again.config.emoe_routing == "threshold"


def router_weight(monkeypatch, change) -> None:
    """Exports whose routers are not the model's."""
    table = Source.table

    def changed(self, index):
        own = table(self, index)
        return own._replace(weight_ED=change(own.weight_ED))

    monkeypatch.setattr(Source, "table", changed)


def test_whoever_answers_yes_runs_no_code_of_the_model(converted, tmp_path, monkeypatch):
    """transformers would ask on the terminal."""
    model = with_tokenizer_of_its_own(shutil.copytree(converted(**KEY), tmp_path / "model"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no usable tokenizer in .*give --verify-tokens 0"):
        emoe.export(model, tmp_path / "out", verify_tokens=256)
    assert not Path("owned").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("to", ["granitemoe", "gpt_oss", "qwen2_moe"])
def test_an_export_that_computes_something_else_is_thrown_away(to, dtype, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "RAW_SCALE", 1.0)  # weights that follow the logits instead of being alike
    monkeypatch.setattr(stock, "SOFTMAX_SPREAD", 1.0)
    wanted = r"computes something else than the model \(KL .*nothing was written\. Try "
    with pytest.raises(UserError, match=wanted + ("--dtype float32, or --to dense$" if dtype else "--to dense$")):
        emoe.export(converted(**KEY), tmp_path / "out", to, dtype=dtype, verify_tokens=256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("to", ["granitemoe", "gpt_oss", "qwen2_moe"])
def test_an_export_that_chooses_otherwise_is_thrown_away(to, dtype, converted, tmp_path, monkeypatch):
    """On its own choices it computes what the model would: these must be as good, too."""
    router_weight(monkeypatch, lambda weight_ED: weight_ED.flip(0))
    with pytest.raises(UserError, match=r"chose an expert .* standard deviations behind one it left out, at most "):
        emoe.export(converted(**KEY), tmp_path / "out", to, dtype=dtype, verify_tokens=256)
    assert list(tmp_path.iterdir()) == []


def test_ties_are_told_from_errors(converted, tmp_path, monkeypatch):
    """A router off by less than rounding is: its few other choices are counted, and the export is kept."""
    noise = torch.Generator().manual_seed(0)
    wrong = lambda weight_ED: weight_ED * (1 + 4e-4 * torch.randn(weight_ED.shape, generator=noise))  # noqa: E731
    router_weight(monkeypatch, wrong)
    report = emoe.export(converted(**KEY), tmp_path / "out", "granitemoe", verify_tokens=2048)
    free, imposed = report["comparisons"]
    assert imposed["changed"] > 0
    assert imposed["margin"] < 1e-3
    assert imposed["kl"] < 1e-10 < free["kl"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "phi3", "gpt_neox", "bert"])
def test_dense_is_exact_for_every_family(family, converted, tmp_path):
    report = emoe.export(converted(family, **FIXED), tmp_path / "out", verify_tokens=256)
    assert report["identical"] == report["layers"] == 4
    assert report["comparisons"][0]["max_difference"] < 1e-4
    assert report["comparisons"][0]["agreement"] == 1.0


@pytest.mark.parametrize(("tokens", "compared"), [(2, 2), (131, 260), (1024, 1040)])
def test_fewer_tokens_than_positions(tokens, compared, converted, tmp_path):
    """RoBERTa's 132 positions, two of which it does not use, are sequences of 130 tokens, or of fewer if so told."""
    report = emoe.export(converted("roberta", **FIXED), tmp_path / "out", verify_tokens=tokens)
    assert report["comparisons"][0]["tokens"] == compared


def test_fewer_tokens_than_the_tokenizer_adds(converted, tmp_path):
    model = shutil.copytree(converted("roberta", **FIXED), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(UserError, match="--verify-tokens: sequences of 2 are too short; give at least 4, or 0"):
        emoe.export(model, tmp_path / "out", verify_tokens=2)
    assert emoe.export(model, tmp_path / "out", verify_tokens=4)["comparisons"][0]["tokens"] == 4


def test_small_divergences_are_told_from_none():
    """Against the textbook in fp64, from far apart to below fp32's own rounding."""
    torch.manual_seed(0)
    a = torch.randn(16, 2000) * 5
    for size in (3.0, 1e-1, 1e-3, 1e-5):
        b = a + size * torch.randn(16, 2000)
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        torch.testing.assert_close(kl_divergence(a, a - b), (p.exp() * (p - q)).sum(-1), rtol=2e-2, atol=1e-11)
    assert (kl_divergence(a, a - a) == 0).all()
    for shift in (20.0, -20.0):  # logits that all fall: KL was -inf, and the mean over tokens shown as 0
        b = a + 3 * torch.randn_like(a) - shift
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        torch.testing.assert_close(kl_divergence(a, a - b), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_what_a_reference_thinks_impossible_counts():
    """A probability of 0 in fp32 times an infinite ratio is no NaN; whatever is NaN stays so."""
    a = torch.zeros(4, 3)
    a[:, 2] = -200.0
    b = a.clone()
    b[0, 2] = 0.0  # two likely words become three
    b[1, 2] = 500.0  # nothing is left of the two
    b[2] += 5.0  # the same distribution
    b[3, 0] = torch.nan
    kl_N = kl_divergence(a, a - b)
    wanted = torch.tensor([math.log(3 / 2), 500 - math.log(2), 0.0, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(kl_N, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("factor", [1e30, torch.nan])
def test_numbers_that_are_none_are_thrown_away(family, factor, converted, tmp_path, monkeypatch):
    own = dense._padded
    monkeypatch.setattr(dense, "_padded", lambda *arguments: own(*arguments) * factor)
    with pytest.raises(UserError, match=r"numbers that are not finite.*nothing was written"):
        emoe.export(converted(family, **FIXED), tmp_path / "out", verify_tokens=256)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_keeps_what_is_not_finite():
    """In whichever sequence it comes."""
    tokens_N, good_NV = torch.arange(4), torch.randn(4, 8)
    for place in range(3):
        sums = _Sums("the model", language=True, causal=True)
        for number in range(3):
            sums.add(good_NV, good_NV * (torch.nan if number == place else 1.0), tokens_N)
        found = sums.finish()
        assert not found.finite
        assert all(math.isnan(number) for number in (found.max_difference, found.kl, found.perplexity[1]))


def test_dense_of_a_classifier(settings, tmp_path, monkeypatch):
    """No language head: what its head gives is compared, and judged."""
    own = tiny_checkpoint(tmp_path / "dense", "llama", head="AutoModelForSequenceClassification")
    emoe.convert(str(own), output=tmp_path / "out", **(settings | FIXED))
    report = emoe.export(tmp_path / "out", tmp_path / "back", verify_tokens=256)
    assert report["comparisons"][0]["kl"] is None
    assert report["comparisons"][0]["agreement"] > 0.9999
    assert report["comparisons"][0]["relative"] < 1e-5
    with pytest.raises(UserError, match="no language head"):
        emoe.export(tmp_path / "out", tmp_path / "granite", "granitemoe")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "\nfrom transformers import AutoModelForSequenceClassification\n" in card
    assert '\nmodel = AutoModelForSequenceClassification.from_pretrained("PATH")\n' in card
    keep = dense._padded
    monkeypatch.setattr(dense, "_padded", lambda *arguments: 1.01 * keep(*arguments))
    with pytest.raises(UserError, match=r"computes something else .*off by .*nothing was written"):
        emoe.export(tmp_path / "out", tmp_path / "wrong", verify_tokens=256)
    assert not (tmp_path / "wrong").exists()


def test_an_earlier_export_is_replaced_when_told(converted, tmp_path, monkeypatch, capsys):
    """Ours alone, and only by one that is complete."""
    flags = ["export", "--model", str(converted(**KEY)), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*flags, "--verify-tokens", "0"]) == 0
    assert main([*flags, "--to", "granitemoe"]) == 2
    assert "exists; choose another folder or add --overwrite" in capsys.readouterr().err
    with monkeypatch.context() as broken:
        broken.setattr(stock, "RAW_SCALE", 1.0)
        assert main([*flags, "--to", "granitemoe", "--overwrite"]) == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert main([*flags, "--to", "granitemoe", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "granitemoe"
    (tmp_path / "out" / "emoe_export.json").unlink()
    assert main([*flags, "--overwrite"]) == 2
    assert "is not a checkpoint of ours, --overwrite will not touch it" in capsys.readouterr().err
    assert main([*flags, "--overwrite", "--output", flags[2]]) == 2
    assert "overlaps the model's own folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["dense", "granitemoe"])
def test_inspect_tells_what_an_export_is(to, converted, tmp_path, monkeypatch, capsys):
    """From what and when, also in the page of `report`."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = converted(**KEY)
    emoe.export(source, tmp_path / "out", to, verify_tokens=256)
    assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    provenance = json.loads((source / "config.json").read_text())["emoe_provenance"]
    kind = {"dense": "llama, exported as dense", "granitemoe": "granitemoe, exported as granitemoe, 3 of 8 experts"}[to]
    for fact in (kind, provenance["source"], f"export; to {to}; 2023-11-14T22:13:20+00:00, from ", "256 tokens with"):
        assert fact in shown
    assert main(["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert f"exported as {to}" in (tmp_path / "page.html").read_text()


def test_inspect_takes_exports_of_older_versions(converted, tmp_path, capsys):
    """Without provenance."""
    emoe.export(converted(**KEY), tmp_path / "out", verify_tokens=0)
    path = tmp_path / "out" / "emoe_export.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "provenance"}))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "exported as dense" in capsys.readouterr().out
    for damaged in ("{", "[]", '{"format": 5}', '{"format": "x", "exactness": "", "provenance": {"history": [1]}}'):
        path.write_text(damaged)
        assert main(["inspect", str(tmp_path / "out")]) == 2
        assert "emoe_export.json" in capsys.readouterr().err


def test_the_card_has_licence_provenance_and_figures(converted, tmp_path):
    source = converted(**KEY)
    card = source / "README.md"
    before = card.read_text()
    try:
        card.write_text(before.replace("tags: [moe, emoe]", "tags: [moe, emoe]\nlicense: apache-2.0"))
        report = emoe.export(source, tmp_path / "out", "granitemoe", verify_tokens=256)
    finally:
        card.write_text(before)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in text
    assert f"{report['comparisons'][0]['max_difference']:.3g}" in text
    assert json.loads((source / "config.json").read_text())["emoe_provenance"]["source_digest"] in text
    assert json.loads((tmp_path / "out" / "emoe_export.json").read_text()) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "granite"], r"--to: unknown format 'granite' \(did you mean 'granitemoe'\?\)"),
        (["--to", "granitemoe", "--fix-k", "9"], "--fix-k: 9 must lie between 1 and the model's 8 experts"),
        (["--dtype", "int4"], "--dtype: unknown element type 'int4'"),
        (["--verify-tokens", "-1"], "--verify-tokens: -1 must be 0, or 2 or more"),
        (["--verify-tokens", "1"], "--verify-tokens: 1 must be 0, or 2 or more"),
        (["--verify-text", "missing.txt"], "--verify-text: missing.txt does not exist"),
        (["--to", "granitemoe", "--dtype", "float16"], "float16 has no room"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, converted, tmp_path, capsys):
    output = ["--model", str(converted(**KEY)), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["export", *output, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []
