"""`emoe pretrain`: text, tokenizer, training, resuming, bad input."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from support.bench import ARCHITECTURE as NEW

from emoe.cli.main import main
from emoe.config import PretrainConfig
from emoe.errors import UserError
from emoe.exporting.hub import packed
from emoe.finetuning.loop import SECONDS
from emoe.moduleformer.sizes import parameters_of
from emoe.pretraining.text import PIECE, Domain, load_domain, mixed, parse_domains, pieces, spread
from emoe.pretraining.tokenizer import train_tokenizer
from emoe.pretraining.train import new_model_config, pretrain

ARCHITECTURE = NEW | {"aux_loss_weight": 0.02}
UMASK = os.umask(0o022)
os.umask(UMASK)
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Packed text of these tests stays out of the user's cache."""
    monkeypatch.setenv("EMOE_HOME", str(tmp_path_factory.getbasetemp() / "emoe-home"))


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """Text of an own alphabet, of several pieces."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    generator = torch.Generator().manual_seed(1)
    path.write_text("".join("qxzwvk \n"[i] for i in torch.randint(8, (5 * PIECE,), generator=generator)))
    return path


@pytest.fixture
def settings(text_file, letters) -> dict:
    return {
        "corpus": [f"words={text_file}", f"letters={letters}"],
        "architecture": ARCHITECTURE,
        "vocabulary": 300,
        "sequence_length": 32,
        "tokens_per_step": 128,
        "batch_sequences": 2,
        "steps": 8,
        "held_out_tokens": 512,
        "evaluate_steps": 4,
        "log_steps": 2,
        "checkpoint_steps": 4,
        "precision": "float32",
    }


def quiet(stage: str, done: int, total: int) -> None:
    pass


def test_held_out_text_is_never_trained_on(letters):
    domain = Domain("letters", str(letters))
    found = list(pieces(domain, 0.2))
    assert "".join(text for _, text in found) == letters.read_text()
    assert [apart for apart, _ in found] == [False, True, False, False, False]


def test_packing(letters, text_file):
    """Every token of the text once, cut into whole sequences; a second call maps the first one's file."""
    domain = Domain("letters", str(letters))
    tokenizer = train_tokenizer([domain, Domain("words", str(text_file))], 300, 0.2)
    assert len(tokenizer) == 300
    text = letters.read_text()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    common = {"length": 64, "share": 0.2}
    found = load_domain(domain, tokenizer, held_out=False, **common)
    wanted = []
    for apart, piece in pieces(domain, 0.2):
        if not apart:
            wanted += [*tokenizer(piece).input_ids, tokenizer.eos_token_id]
    assert list(itertools.chain(*found["input_ids"])) == wanted[: len(wanted) // 64 * 64]
    again = load_domain(domain, tokenizer, held_out=False, **common)
    assert again.cache_files == found.cache_files
    part = load_domain(domain, tokenizer, held_out=False, most=256, **common)
    assert part["input_ids"][:] == found["input_ids"][:4]
    with pytest.raises(UserError, match="held out"):
        load_domain(domain, tokenizer, held_out=True, length=100_000, share=0.2)
    words = load_domain(Domain("words", str(text_file)), tokenizer, held_out=False, **common)
    both = mixed([found, words], "equal", 0)
    of_letters = sum(row in found["input_ids"][:] for row in both["input_ids"])
    assert 0.35 < of_letters / len(both) < 0.65
    assert len(mixed([found, words], "size", 0)) == len(found) + len(words)


def test_what_is_measured_on_comes_from_all_over(letters):
    """Of the held-out part the first and the last sixteenth of 16 are among 8 that are taken."""
    domain = Domain("letters", str(letters))
    tokenizer = train_tokenizer([domain], 300, 0.2)
    common = {"length": 64, "share": 0.2, "held_out": True}
    whole = load_domain(domain, tokenizer, **common)["input_ids"][:]
    part = load_domain(domain, tokenizer, **common, most=512)["input_ids"][:]
    places = [whole.index(row) for row in part]
    assert len(part) == 8 and places == sorted(places)
    assert places[0] < len(whole) / 8 and places[-1] > 3 / 4 * len(whole)
    near = load_domain(domain, tokenizer, **common, most=512, read=1024)["input_ids"][:]
    assert [whole.index(row) for row in near] == [0, 2, 4, 6, 8, 10, 12, 14]
    for number in (3, 8, 9, 15, 16, 17, 1000):
        found = spread(range(number), 8)
        assert len(found) == len(set(found)) == min(8, number) and found == sorted(found)
        assert found[0] == 0 and found[-1] >= number * 3 / 4 - 1


def killed(stage, done, total):
    """Progress of a run that is killed behind the state of its fourth step."""
    if done == 6:
        raise KeyboardInterrupt


def test_other_text_is_not_gone_on_with(settings, letters, tmp_path):
    """The name stays, what it names does not: the model would be of both. The same text written again is no other."""
    own, first = tmp_path / "letters.txt", letters.read_bytes()
    own.write_bytes(first)
    settings |= {"corpus": [settings["corpus"][0], f"letters={own}"], "output": str(tmp_path / "out")}
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(**settings), killed)
    own.write_bytes(first[::-1])
    with pytest.raises(UserError, match="what --corpus letters names has changed since the unfinished training began"):
        pretrain(PretrainConfig(**settings, resume=True), quiet)
    own.write_bytes(first)
    os.utime(own, (0, 0))
    assert pretrain(PretrainConfig(**settings, resume=True), quiet)["steps"] == 8


def test_training_resuming_and_what_is_written(settings, tmp_path, monkeypatch):
    """A run that was killed behind its first state ends as an undisturbed one, to the bit."""
    whole = pretrain(PretrainConfig(**settings, output=str(tmp_path / "whole")), quiet)
    assert whole["steps"] == 8
    assert whole["tokens"] == 8 * 128
    assert set(whole["perplexity"]) == set(whole["gates"]) == {"words", "letters"}
    for gate in whole["gates"]["words"]:
        assert sum(gate["load"]) == pytest.approx(1)
        assert 0 <= gate["conditional"] <= gate["marginal"] + 1e-6
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "perplexity" in line] == [4, 8]
    first = next(line for line in lines if "gates" in line)
    assert [(g["layer"], g["part"]) for g in first["gates"]] == [
        (layer, part) for layer in range(2) for part in ("attention", "ffn")
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id

    parted = {**settings, "output": str(tmp_path / "parted")}
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(**parted), killed)
    with pytest.raises(UserError, match="other settings"):
        pretrain(PretrainConfig(**{**parted, "learning_rate": 0.5, "resume": True}), quiet)
    (state,) = (tmp_path / ".parted.emoe-state" / "training").glob("checkpoint-4/trainer_state.json")
    facts = json.loads(state.read_text())
    assert 0 < facts["stateful_callbacks"][SECONDS] < 600
    facts["stateful_callbacks"][SECONDS] += 3600
    state.write_text(json.dumps(facts))
    assert 60 <= pretrain(PretrainConfig(**parted, resume=True), quiet)["minutes"] < 70
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parted")]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="--overwrite"):
        pretrain(PretrainConfig(**parted), quiet)


def test_it_learns(settings, tmp_path):
    """Two alphabets: perplexity falls far below the vocabulary, and near the entropy of the random letters."""
    more = {"steps": 60, "learning_rate": 1e-2, "log_steps": 30, "evaluate_steps": 100, "checkpoint_steps": 100}
    report = pretrain(PretrainConfig(**(settings | more), output=str(tmp_path / "out")), quiet)
    assert report["perplexity"]["letters"] < 150
    assert report["perplexity"]["words"] < 60


def test_another_architecture_with_a_given_tokenizer(settings, tiny_llama, tmp_path):
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    changes = {"architecture": llama, "tokenizer": str(tiny_llama), "steps": 2, "output": str(tmp_path / "out")}
    report = pretrain(PretrainConfig(**(settings | changes)), quiet)
    assert report["model_type"] == "llama"
    assert not report["gates"]
    assert report["parameters"]["active"] == report["parameters"]["total"]


def test_command(settings, tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump({**settings, "steps": 2}))
    assert main(["pretrain", "--config", str(config), "--output", str(tmp_path / "out")]) == 0
    assert "FFN H(m|x)" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~UMASK
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "2 steps, 256 tokens" in capsys.readouterr().out
    assert packed(tmp_path / "out").left_out == []
    card = (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "emoe_pretrain.json").read_text())
    assert not report["notes"]
    for name, perplexity in report["perplexity"].items():
        assert f"| {name} | {report['corpus_tokens'][name]:,} | {perplexity:.2f} |" in card


def test_too_little_text_is_told(settings, letters, tmp_path, capsys):
    flags = ["--corpus", f"short={letters}", "--corpus-tokens", "32"]
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["pretrain", "--config", str(config), *flags, "--output", str(tmp_path / "out")]) == 0
    assert "note: short has 32 tokens to train on, read 32 times" in capsys.readouterr().out
    (tmp_path / "empty.txt").touch()
    flags = ["--corpus", f"letters={letters}", "--corpus", f"nothing={tmp_path / 'empty.txt'}"]
    assert main(["pretrain", "--config", str(config), *flags, "--output", str(tmp_path / "none")]) == 2
    assert "--corpus: nothing holds no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": []}, "--corpus: missing"),
        ({"corpus": ["fictoin"]}, "did you mean 'fiction'"),
        ({"corpus": ["a=./nowhere.txt"]}, "--corpus: ./nowhere.txt does not exist"),
        ({"corpus": ["a=x.txt", "a=y.txt"]}, "given twice"),
        ({"tokenizer": "./nowhere"}, "--tokenizer: ./nowhere does not exist"),
        ({"architecture": {}}, "--config: missing, or without 'architecture:'"),
        ({"architecture": {"n_layer": 2}}, "--config: architecture: model_type None is unknown"),
        ({"architecture": {"model_type": "moduleformr"}}, "did you mean 'moduleformer'"),
        ({"architecture": {"model_type": "moduleformer", "n_layers": 2}}, "--config: architecture: moduleformer has"),
        ({"architecture": {"model_type": "moduleformer", "k_mlp": 99}}, "k_mlp=99 must lie between"),
        ({"architecture": ARCHITECTURE | {"vocab_size": 10}}, "vocab_size=10"),
        ({"tokens_per_step": 16}, "--tokens-per-step: 16 is less than a sequence"),
        ({"learning_rate": 1e30, "log_steps": 100}, "lower --learning-rate"),
        ({"output": ""}, "--output: missing"),
    ],
)
def test_bad_input(settings, tmp_path, capsys, change, message):
    """One line that names the flag, exit status 2, nothing left behind."""
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "out"), **change}))
    assert main(["pretrain", "--quiet", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml"}


PUBLISHED = {"350M-4B": (24, 4_142_526_464), "700M-4B": (24, 4_142_526_464), "700M-8B": (48, 8_182_046_720)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Counted on the meta device."""
    fields = yaml.safe_load((CONFIGS / "moduleformer" / f"{name}.yaml").read_text())["architecture"]
    config = new_model_config(fields)
    assert (config.n_layer, parameters_of(config).total) == PUBLISHED[name]
    assert config.shares_keys_and_values


def test_baselines_have_the_same_active_size():
    sizes = {}
    for path in (CONFIGS / "moduleformer").glob("tiny*.yaml"):
        settings = PretrainConfig(**yaml.safe_load(path.read_text()))
        sizes[path.stem] = parameters_of(new_model_config({"vocab_size": 4096, **settings.architecture}))
    assert sizes["tiny"] == sizes["tiny-switch"] == sizes["tiny-rotary"] == sizes["tiny-unbalanced"]
    assert sizes["tiny"].total > 5e6
    assert sizes["tiny-dense"].active == sizes["tiny-dense"].total
    assert sizes["tiny-dense"].active == pytest.approx(sizes["tiny"].active, rel=1e-3)


def test_domains():
    assert parse_domains(["fiction", "own=a/b.txt"]) == [Domain("fiction", None), Domain("own", "a/b.txt")]
