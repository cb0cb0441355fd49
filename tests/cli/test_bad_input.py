"""Whatever is wrong with the input: one clear line that names the flag and the fix, status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoe.cli.main import main
from emoe.config import RecoverConfig, merge_settings
from emoe.errors import UserError


@pytest.fixture
def refused(capsys):
    """Run the command line and return its one line of complaint."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        complaint = [line for line in error if line.startswith("emoe: ")]
        assert len(complaint) == 1, error
        assert "Traceback" not in "".join(error)
        return complaint[0]

    return run


@pytest.fixture
def broken(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "broken"))


def flags(text_file, tmp_path) -> list:
    return [
        *("--experts", 8, "--output", tmp_path / "out", "--calibration", text_file),
        *("--calibration-tokens", 2048, "--held-out-tokens", 0, "--sequence-length", 64),
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--experts", 10], "--experts: FFN width 48 is not divisible by 10; try 8 or 12"),
        (["--experts", 0], "--experts: must be at least 1, got 0"),
        (["--experts", "x"], "--experts"),
        (["--routing", "topk"], "--routing: must be one of "),
        (["--routing", "topk"], "(did you mean 'top-k'?)"),
        (["--active", 0.5, "--budget", 0.25], "--budget: says how many experts are used, as --active does"),
        (["--top-k", 9], "--top-k: 9 is more than --experts 8"),
        (["--layers", "4"], "--layers: layer 4 is out of range; the model has 4 layers, 0 to 3"),
        (["--layers", "2:9"], "--layers: '2:9' is out of range"),
        (["--layers", "a,b"], "--layers: 'a' is not 'all', a number or a slice such as 16:32:4"),
        (["--layers", "2:2"], "--layers: '2:2' selects no layer"),
        (["--split", "coactivaton"], "--split"),
        (["--gate", "oracle"], "--gate: 'oracle' looks at the answer"),
        (["--gate", "averagekey"], "did you mean 'average-key'?"),
        (["--preset", "fats"], "--preset: unknown preset 'fats' (did you mean 'fast'?)"),
        (["--calibration", "nowhere.txt"], "--calibration: nowhere.txt does not exist"),
        (["--calibration", "nowhere.txt", "--dry-run"], "--calibration: nowhere.txt does not exist"),
        (["--calibration", "builtn"], "--calibration: no text 'builtn' (did you mean 'builtin'?)"),
        (
            ["--calibration", "corpus:germn", "--dry-run"],
            "--calibration: unknown corpus 'germn' (did you mean 'german'?)",
        ),
        (["--held-out", "nowhere.md", "--dry-run"], "--held-out: nowhere.md does not exist"),
        (["--calibration-tokens", "many"], "--calibration-tokens"),
        (["--dtype", "float8"], "--dtype"),
        (["--bogus", 1], "--bogus"),
        (["--device", "cuda"], "--device: 'cuda' is not usable here"),
        (["--device", "gpu"], "--device: 'gpu' is not usable here"),
        (["--sequence-length", 4], "--sequence-length"),
    ],
)
def test_settings(arguments, complaint, refused, tiny_llama, text_file, tmp_path):
    base = flags(text_file, tmp_path)
    if arguments[0] in base and arguments[0] != "--calibration":
        at = base.index(arguments[0])
        del base[at : at + 2]
    line = refused("convert", "--model", tiny_llama, *base, *arguments)
    assert complaint in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.emoe-partial").exists()


def test_resuming_what_is_finished_is_no_failure(tiny_llama, text_file, tmp_path, capsys):
    command = ["convert", "--model", tiny_llama, *flags(text_file, tmp_path), "--layers", "3", "--quiet", "--resume"]
    command = [str(word) for word in command]
    assert main(command) == 0
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert main(command) == 0
    assert "out is finished: nothing to go on with" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    assert main([word for word in command if word != "--resume"]) == 2


def test_a_frontier_keeps_out_of_foreign_folders(refused, tiny_llama, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miaow")
    line = refused("frontier", "--model", tiny_llama, "--experts", 8, "--output", tmp_path / "photos")
    assert "photos holds other things than a frontier; choose another folder" in line
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_several_numbers_may_stand_behind_one_flag():
    assert merge_settings(RecoverConfig, {"budgets": ["0.25,0.5", "0.75"]}).budgets == [0.25, 0.5, 0.75]
    with pytest.raises(UserError, match="--budgets: must be a number, got 'half'"):
        merge_settings(RecoverConfig, {"budgets": ["0.25,half"]})


@pytest.mark.parametrize(("text", "complaint"), [("", "is empty or shorter"), ("short " * 100, "at least")])
def test_too_little_text(text, complaint, refused, tiny_llama, text_file, tmp_path):
    (tmp_path / "short.txt").write_text(text)
    base = flags(text_file, tmp_path)
    base[base.index("--calibration") + 1] = tmp_path / "short.txt"
    assert complaint in refused("convert", "--model", tiny_llama, *base)


def test_text_that_is_not_utf8(refused, tiny_llama, text_file, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9999)
    base = flags(text_file, tmp_path)
    base[base.index("--calibration") + 1] = tmp_path / "latin.txt"
    assert "is not UTF-8 text" in refused("convert", "--model", tiny_llama, *base)


def test_unknown_family_and_alias(refused, broken, text_file, tmp_path):
    base = flags(text_file, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    line = refused("convert", "--model", broken, *base)
    assert "unknown family 'lama' (did you mean 'llama'?). Known families: llama, mistral" in line
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "moduleformer"}))
    assert "text with `emoe tune`" in refused("convert", "--model", broken, *base)
    assert "'smollm2-135m'" in refused("convert", "--model", "smollm-135m", *base)
    assert "--model: missing" in refused("convert", *base)


@pytest.mark.parametrize("name", ["./such", "~/such", "../such", "no/such/folder", "no/such.gguf"])
@pytest.mark.parametrize(
    "command",
    [
        *(["convert"], ["frontier", "--experts", "8"], ["estimate"], ["finetune", "--task", "spam"]),
        *(["tune"], ["recover"], ["analyze", "a=builtin"], ["prune", "--keep", "1"], ["extend", "--experts", "1"]),
    ],
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(command, name, refused, tmp_path, monkeypatch):
    """Nor are a task's texts fetched before."""
    for asked in ("huggingface_hub.snapshot_download", "emoe.finetuning.tune.read_data"):
        monkeypatch.setattr(asked, None)
    for auto in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{auto}.from_pretrained", None)
    output = [] if command[0] == "estimate" else ["--output", tmp_path / "out"]
    text = ["--text", "builtin"] if command[0] == "prune" else []
    line = refused(*command, "--model", name, *output, *text)
    assert line.startswith("emoe: --model: ")
    assert Path(name).name in line


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["extend", "--experts", "1", "--old-share", "0.1"], "--old-share: has no effect without --text and"),
        (
            ["prune", "--keep", "1", "--method", "random", "--text", "a.txt"],
            "--text: has no effect with --method random",
        ),
        (["prune", "--remove", "last", "--task", "spam"], "--task: has no effect with --remove last"),
        (["tune", "--lora-rank", "8"], "--lora-rank: has no effect with --train all"),
        (
            ["prune", "--keep", "0.5", "--normalise", "sum", "--scope", "layer"],
            "--normalise: has no effect",
        ),
        (["prune", "--threshold", "0.5", "--scope", "layer"], "--scope: has no effect with --threshold"),
        (
            ["prune", "--keep", "1", "--count", "hard", "--method", "random"],
            "--count: has no effect with --method",
        ),
        (["prune", "--keep", "1", "--floor", "2", "--method", "layers-top"], "--floor: has no effect with --method"),
        (["prune", "--remove", "last", "--floor", "2"], "--floor: has no effect with --remove last"),
        (
            ["export", "--verify-tokens", "0", "--verify-text", "builtin"],
            "--verify-text: has no effect",
        ),
        (["export", "--private"], "--private: has no effect without --push-to-hub"),
    ],
)
def test_settings_without_effect(command, complaint, refused, tmp_path):
    """Given, be it the value that they have by themselves."""
    assert complaint in refused(*command, "--model", tmp_path, "--output", tmp_path / "out")


def test_a_setting_without_effect_in_a_file(refused, tmp_path):
    (tmp_path / "settings.yaml").write_text("lora_rank: 4\n")
    assert "--lora-rank: has no effect" in refused("tune", "--config", tmp_path / "settings.yaml")


def test_an_output_is_needed(refused, tiny_llama):
    assert "--output: missing" in refused("tune", "--model", tiny_llama)


def test_weights_that_are_not_finite(refused, broken, text_file, tmp_path):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused("convert", "--model", broken, *flags(text_file, tmp_path))
    assert "model.layers.2.mlp.up_proj.weight holds NaN or infinite values" in line
    assert not (tmp_path / "out").exists()


def sharded(folder: Path) -> dict:
    """Split the one weights file into two shards with an index; the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, held in halves.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: file for file, held in halves.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(refused, broken, text_file, tmp_path):
    base = flags(text_file, tmp_path)
    index = sharded(broken)
    assert main(["convert", "--model", str(broken), "--quiet", *map(str, base)]) == 0
    base = [tmp_path / "out2" if b == tmp_path / "out" else b for b in base]

    whole = (broken / "b.safetensors").read_bytes()
    (broken / "b.safetensors").write_bytes(whole[:-100])
    assert "b.safetensors is truncated or damaged" in refused("convert", "--model", broken, *base)
    (broken / "b.safetensors").unlink()
    assert "shard b.safetensors is missing" in refused("convert", "--model", broken, *base)
    for outside in ("../b.safetensors", "/etc/passwd", ".."):
        index["weight_map"]["model.norm.weight"] = outside
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "a file outside the folder" in refused("convert", "--model", broken, *base)
    (broken / "model.safetensors.index.json").write_text("{")
    assert "is not valid JSON" in refused("convert", "--model", broken, *base)


def test_a_pickle_is_never_opened(refused, broken, text_file, tmp_path):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert "only pickled weights" in refused("convert", "--model", broken, *flags(text_file, tmp_path))


def test_a_missing_tensor_and_a_wrong_shape(refused, broken, text_file, tmp_path):
    tensors = load_file(broken / "model.safetensors")
    cut = {n: t for n, t in tensors.items() if n != "model.layers.1.self_attn.q_proj.weight"}
    save_file(cut, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused("convert", "--model", broken, *flags(text_file, tmp_path))
    assert "model.layers.1.self_attn.q_proj.weight is in no shard" in line
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "has shape (3, 3)" in refused("convert", "--model", broken, *flags(text_file, tmp_path))


def test_no_space_is_seen_beforehand(refused, tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("emoe.runtime.free_bytes", lambda folder: 1 << 20)
    line = refused("convert", "--model", tiny_llama, *flags(text_file, tmp_path), "--dry-run")
    assert "--output" in line
    assert "1.0 MiB free" in line


def test_dry_run_writes_nothing(tiny_llama, text_file, tmp_path, capsys):
    for left in (".out.emoe-state", ".out.emoe-replaced"):  # nor does it take anything away
        (tmp_path / left).mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", "--model", str(tiny_llama), *map(str, flags(text_file, tmp_path)), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_can_be_read_by_programs(tiny_llama, text_file, tmp_path, capsys):
    arguments = ["convert", "--model", str(tiny_llama), *map(str, flags(text_file, tmp_path)), "--dry-run", "--quiet"]
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["settings"]["model"] == str(tiny_llama)
    assert found["disk_bytes"] > 0
    assert said.err == ""


def test_config_file(refused, tiny_llama, text_file, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("expert: 8\n")
    assert "unknown key 'expert' (did you mean 'experts'?)" in refused("convert", "--config", path)
    path.write_text("experts: [")
    assert "is not valid YAML" in refused("convert", "--config", path)
    path.write_text("!!python/object/apply:os.system ['true']")
    assert "is not valid YAML" in refused("convert", "--config", path)
    path.write_text("experts: many\n")
    assert "--experts" in refused("convert", "--config", path)
    assert "cannot read" in refused("convert", "--config", tmp_path / "none.yaml")


def test_export_and_inspect(refused, tiny_llama, converted_llama, tmp_path):
    assert "not a converted checkpoint" in refused("export", "--model", tiny_llama, "--output", tmp_path / "x")
    assert "not a folder" in refused("export", "--model", tmp_path / "none", "--output", tmp_path / "x")
    assert "unknown format 'dens' (did you mean 'dense'?)" in refused(
        "export", "--model", converted_llama, "--output", tmp_path / "x", "--to", "dens"
    )
    (tmp_path / "mine").write_text("")
    assert "exists" in refused("export", "--model", converted_llama, "--output", tmp_path)
    assert "not a converted checkpoint" in refused("inspect", tiny_llama)
    damaged = Path(shutil.copytree(converted_llama, tmp_path / "damaged"))
    (damaged / "partition.safetensors").write_bytes(b"nonsense")
    assert "partition.safetensors is missing or damaged" in refused("inspect", damaged)
    assert "converted already" in refused("convert", "--model", converted_llama, "--output", tmp_path / "y")
