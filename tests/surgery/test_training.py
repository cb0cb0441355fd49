"""What trains after surgery trains, and nothing else changes by a bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from emoe.checkpoint.digests import write_digests
from emoe.cli.main import main
from emoe.config import TuneConfig, loss_factors
from emoe.errors import UserError
from emoe.finetuning.low_rank import entries_of_rank_one
from emoe.finetuning.plain_text import tune
from emoe.finetuning.tuning import trainable
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import LOSSES, RouterLosses, train_only

TRAIN = (
    *("--steps", 12, "--tokens-per-step", 256, "--sequence-length", 64, "--held-out-tokens", 256),
    *("--learning-rate", 1e-2, "--precision", "float32"),
)


@pytest.fixture(params=["converted_llama", "cosine", "tiny_moduleformer"])
def model(request):
    return request.getfixturevalue(request.param)


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def report_of(folder) -> dict:
    return json.loads((folder / "emoe_tune.json").read_text())


def config_of(folder) -> dict:
    """config.json without what was done."""
    config = json.loads((folder / "config.json").read_text())
    (config.get("emoe_provenance") or {}).pop("history", None)
    return {key: value for key, value in config.items() if value not in (None, {})}


@pytest.mark.parametrize("name", ["converted_llama", "tiny_moduleformer", "bfloat16_llama", "bfloat16_moduleformer"])
def test_old_modules_stay_bit_for_bit(name, request, run, text_file):
    """Two tasks in sequence: after each, taking the newest modules out gives the model before, types and all."""
    model = request.getfixturevalue(name)
    flags = ("--text", text_file, *TRAIN, "--train", "new-modules", "--loss", "router=0.001")
    previous = model
    for number in range(2):
        extended = run("extend", previous, f"extended {number}", "--experts", 2)
        trained = run("tune", extended, f"trained {number}", *flags)
        back = run("prune", trained, f"back {number}", "--remove", "last")
        before, after = weights(previous), weights(back)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
        assert config_of(previous) == config_of(back)
        found, start = report_of(trained)["perplexity"]["training domain"], weights(extended)
        assert found["after"] < 0.998 * found["before"]
        assert any(not torch.equal(start[name], new) for name, new in weights(trained).items())
        previous = trained
    config = json.loads((previous / "config.json").read_text())
    assert [step["verb"] for step in config["emoe_provenance"]["history"]] == ["extend", "tune"] * 2


def test_gates_alone(model, run, text_file):
    trained = run("tune", model, "trained", "--text", text_file, *TRAIN, "--train", "router")
    before, after = weights(model), weights(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".router." in name or ".gate." in name for name in changed)


def test_lora_is_merged(converted_llama, run, text_file):
    trained = run("tune", converted_llama, "lora", "--text", text_file, *TRAIN, "--train", "lora", "--lora-rank", 2)
    found = report_of(trained)
    assert found["perplexity"]["training domain"]["after"] < found["perplexity"]["training domain"]["before"]
    assert 0 < found["trained"] < 0.3 * found["parameters"]
    assert weights(trained).keys() == weights(converted_llama).keys()


def test_lora_reaches_the_experts_of_a_moduleformer(tiny_moduleformer, text_file, tmp_path):
    """All stacks change, nothing else is written, and a run that was killed ends as an undisturbed one."""
    settings = {"model": str(tiny_moduleformer), "text": [str(text_file)], "train": "lora", "lora_rank": 2, "steps": 6}
    settings |= {"tokens_per_step": 128, "sequence_length": 64, "held_out_tokens": 128, "checkpoint_steps": 2}
    settings |= {"precision": "float32", "learning_rate": 1e-2}
    report = assert_resumes(settings, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moduleformer)
    assert report["trained"] == 2 * entries_of_rank_one(model)
    before, after = weights(tiny_moduleformer), weights(tmp_path / "whole")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "experts.weight" in name)


def test_text_that_is_read_more_than_once_is_noted(tiny_moduleformer, run, tmp_path):
    """At most four fifths of a short text train, the rest is held out."""
    text = tmp_path / "short.txt"
    text.write_text("it is the first that they ever heard of it. " * 80, encoding="utf-8")
    steps = ("--tokens-per-step", 128, "--sequence-length", 32, "--held-out-tokens", 64, "--learning-rate", 1e-3)
    found = {}
    for number in (1, 40):
        report = report_of(run("tune", tiny_moduleformer, f"{number}", "--text", text, *steps, "--steps", number))
        found[number] = report["notes"]
    size = int(found[40][0].split()[2].replace(",", ""))
    assert found == {1: [], 40: [f"--text has {size:,} tokens to train on, read {40 * 128 / size:.1f} times"]}


@pytest.fixture
def killed(converted_llama, text_file, tmp_path):
    """Settings of a training, and its unfinished output: killed at its third step, with the state of its second."""
    shutil.copytree(converted_llama, tmp_path / "model")
    shutil.copyfile(text_file, tmp_path / "text.txt")
    settings = {"model": str(tmp_path / "model"), "text": [str(tmp_path / "text.txt")], "output": str(tmp_path / "out")}
    settings |= {"steps": 4, "tokens_per_step": 128, "sequence_length": 64, "held_out_tokens": 128}
    settings |= {"precision": "float32", "checkpoint_steps": 2}

    def stop(stage, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(TuneConfig(**settings), stop)
    return settings


@pytest.mark.parametrize("changed", ["--model", "--text", "learning_rate"])
def test_other_sources_are_not_gone_on_with(changed, killed, tmp_path):
    """The names stay, what they name does not: the model would be of both."""
    if changed == "--model":
        path = next((tmp_path / "model").glob("model*.safetensors"))
        save_file({name: 2 * t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
        write_digests(tmp_path / "model")
    elif changed == "--text":
        (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text()[::-1])
    else:
        killed["learning_rate"] = 0.5
    found = (
        "learning_rate: 0.0001, now 0.5" if changed == "learning_rate" else f"what {changed} names has changed since"
    )
    with pytest.raises(UserError) as caught:
        tune(TuneConfig(**killed, resume=True), lambda *_: None)
    assert found in str(caught.value)
    assert list((tmp_path / ".out.emoe-state" / "training").glob("checkpoint-2"))  # what there is, stays
    tune(TuneConfig(**killed, overwrite=True), lambda *_: None)


def test_the_same_sources_are_gone_on_with(killed, tmp_path):
    assert tune(TuneConfig(**killed, resume=True), lambda *_: None)["steps"] == 4


def entropy(folder) -> float:
    """Mean over gates of H(m), the entropy of the mean probabilities."""
    anatomy, sums = anatomy_of(folder), {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(5, 96, (4, 64), generator=torch.Generator().manual_seed(0))
    see = lambda name, seen: sums.update({name: seen.logits_NE.softmax(-1).mean(0)})  # noqa: E731
    with torch.no_grad(), anatomy.watch(model, see, energies=False):
        model(tokens)
    return sum(-(p * p.clamp_min(1e-30).log()).sum().item() for p in sums.values()) / len(sums)


def test_concentration_gathers_the_load(model, run, text_file):
    flags = ("--text", text_file, *TRAIN)
    plain = run("tune", model, "plain", *flags)
    gathered = run("tune", model, "gathered", *flags, "--loss", "concentration=1.0")
    assert entropy(gathered) < entropy(plain) - 0.1


def test_only_new_rows_have_gradients_and_states(model, run):
    folder = run("extend", model, "big", "--experts", 2)
    anatomy, loaded = anatomy_of(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = train_only(loaded, anatomy, "new-modules")
    losses = RouterLosses(loaded, anatomy, {"concentration": 0.1, "router": 0.1}, "new-modules")
    loaded.train()
    tokens = torch.randint(5, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    (loaded(tokens, labels=tokens).loss + losses.take()).backward()
    losses.close()
    gradients = [parameter.grad for parameter in loaded.parameters() if parameter.grad is not None]
    shapes = [(*slot_shape[:axis], rows, *slot_shape[axis + 1 :]) for axis, rows, slot_shape in new_rows(frozen)]
    assert sorted(tuple(gradient.shape) for gradient in gradients) == sorted(shapes)
    assert sum(gradient.numel() for gradient in gradients) == trainable(loaded)
    moved = sum(gradient.abs().max() > 0 for gradient in gradients)
    assert moved >= len(gradients) // 3  # behind an output matrix of zeros nothing moves in the first step
    frozen.check(loaded)
    frozen.merge()
    frozen.check(loaded)
    assert all("parametrizations" not in name for name in loaded.state_dict())
    with torch.no_grad():
        next(iter(loaded.parameters())).add_(1.0)
    with pytest.raises(RuntimeError, match="was to stay as it is"):
        frozen.check(loaded)


def new_rows(frozen) -> list[tuple[int, int, tuple[int, ...]]]:
    """Axis, number of rows that train, and shape of each tensor that trains in part."""
    return [(part.axis, len(part.index_M), tuple(part.parameter.shape)) for part in frozen.parts.values()]


def masked(model, frozen) -> list[torch.nn.Parameter]:
    """The same training the long way round: whole tensors, from whose gradients all but the new rows' are taken."""
    frozen.merge()
    for part in frozen.parts.values():
        whole = part.parameter.requires_grad_(True)
        mask = torch.zeros_like(whole).index_fill_(part.axis, part.index_M, 1.0)
        whole.register_hook(lambda gradient, mask=mask: gradient * mask)
    return [part.parameter for part in frozen.parts.values()]


@pytest.mark.parametrize("fused", [False, True])
def test_training_new_rows_equals_training_masked_tensors(model, run, fused):
    """Six steps of two forward calls each, with gradients clipped by their norm; up to rounding in fp32."""
    folder, found = run("extend", model, "big", "--experts", 2), {}
    tokens = torch.randint(5, 96, (6, 2, 2, 32), generator=torch.Generator().manual_seed(0))
    for way in ("rows", "masked"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        frozen = train_only(loaded, anatomy_of(folder), "new-modules")
        trained = masked(loaded, frozen) if way == "masked" else [p for p in loaded.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=fused)
        for step_2BT in tokens:
            sum(loaded(part_BT, labels=part_BT).loss for part_BT in step_2BT).backward()  # both calls before backward
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        frozen.merge()
        frozen.check(loaded)
        found[way] = loaded.state_dict()
    start = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert found["rows"].keys() == found["masked"].keys()
    assert any(not torch.equal(start[name], found["rows"][name]) for name in start if "gate" not in name)
    for name, after in found["rows"].items():
        torch.testing.assert_close(after, found["masked"][name], rtol=1e-5, atol=1e-6)


def test_split_rows_leave_the_sparse_kernels_in_place(converted_llama, run):
    """A linear that torch has parametrised is still read by the kernels, whatever its class is called now."""
    folder = run("extend", converted_llama, "big", "--experts", 2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    train_only(loaded, anatomy_of(folder), "new-modules")
    for ffn in loaded.sparse_ffns().values():
        assert ffn.plain
        assert ffn.linear("down").weight.data_ptr() == ffn.linear("down").parametrizations.weight.original.data_ptr()


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("train", ["new-modules", "new-experts"])
def test_modules_that_no_token_uses_are_not_trained_in_vain(train, steps, model, run, text_file, tmp_path, capsys):
    """Gate rows of zeros, and a bias below them, open on nothing."""
    extended = run("extend", model, "big", "--experts", 2)
    for path in extended.glob("model*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            gate = name.endswith((".router.weight", ".router.bias", "centroids.weight")) or ".gate." in name
            if gate and len(tensor) > 2:
                tensor[-2:] = -1.0 if name.endswith(".bias") else 0.0
        save_file(tensors, path, metadata={"format": "pt"})
    write_digests(extended)
    flags = ["tune", "--model", str(extended), "--output", str(tmp_path / "out"), "--text", str(text_file)]
    flags += [*map(str, TRAIN), "--steps", str(steps), "--train", train, "--quiet", "--checkpoint-steps", "2"]
    for again in ([], ["--resume"]):  # what had been saved by then is not gone on with
        assert main([*flags, *again]) == 2
        assert f"--train: with {train} nothing learns, in the first steps no weight got a" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]


def test_training_of_new_modules_goes_on_after_a_kill(model, run, text_file, tmp_path):
    extended = run("extend", model, "big", "--experts", 2)
    settings = {"model": str(extended), "text": [str(text_file)], "train": "new-modules", "steps": 6}
    settings |= {"tokens_per_step": 128, "sequence_length": 64, "held_out_tokens": 128, "checkpoint_steps": 2}
    settings |= {"precision": "float32", "learning_rate": 1e-2, "loss": ["router=0.001"]}
    assert_resumes(settings, tmp_path)


def assert_resumes(settings: dict, folder) -> dict:
    """A run that was killed in its fifth step ends as an undisturbed one, whose report this returns."""
    report = tune(TuneConfig(**settings, output=str(folder / "whole")), lambda *_: None)

    def killed(stage, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(TuneConfig(**settings, output=str(folder / "parted")), killed)
    tune(TuneConfig(**settings, output=str(folder / "parted"), resume=True), lambda *_: None)
    whole, parted = weights(folder / "whole"), weights(folder / "parted")
    logs = [folder / name / "log.jsonl" for name in ("whole", "parted")]
    assert logs[0].read_text() == logs[1].read_text()
    assert [name for name in whole if not torch.equal(whole[name], parted[name])] == []
    return report


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["concentrate=0.1"], "unknown loss 'concentrate' (did you mean 'concentration'?)"),
        (["concentration"], "'concentration' is not concentration=FACTOR"),
        (["concentration=-1"], "is not concentration=FACTOR with a factor above 0"),
        (["mi=nan"], "is not mi=FACTOR with a factor above 0"),
        (["router=much"], "is not router=FACTOR"),
        (["mi=1", "mi=2"], "mi is given twice"),
    ],
)
def test_losses_are_checked(given, complaint):
    with pytest.raises(UserError) as caught:
        loss_factors(given, LOSSES)
    assert complaint in str(caught.value)


def test_bad_input(converted_llama, tiny_moduleformer, tiny_llama, text_file, tmp_path, capsys):
    def refused(model, *flags) -> str:
        arguments = ["tune", "--model", model, "--output", tmp_path / "out", "--text", text_file, *TRAIN, *flags]
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    assert "no new modules; add some with `emoe extend`" in refused(converted_llama, "--train", "new-modules")
    assert "has no experts" in refused(tiny_llama, "--train", "router")
    assert "--train: " in refused(converted_llama, "--train", "expert")
    everything = "every token uses every expert of this model, its gates choose nothing; give --top-k"
    assert f"--train: {everything}" in refused(converted_llama, "--train", "router", "--top-k", 8)
    for model in (converted_llama, tiny_moduleformer):
        line = refused(model, "--train", "lora", "--loss", "router=1")
        assert "--loss: router acts on the gates' own rows, which get no gradient with --train lora" in line
    assert f"--loss: {everything}" in refused(converted_llama, "--loss", "concentration=1", "--top-k", 8)
