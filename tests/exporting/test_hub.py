"""Uploads arrive whole, with their card, and with nothing else of the user's; what goes wrong is one line. Against a
stand-in on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from support.hub import TOKEN, Hub, stand_in
from support.routing import KEY

from emoe.checkpoint.names import names_only
from emoe.cli.main import main
from emoe.errors import UserError
from emoe.exporting.hub import push


@pytest.fixture
def hub():
    with stand_in() as hub:
        yield hub


def emoe_command(hub: Hub, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "emoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | settings | environment,
    )


def test_an_export_is_pushed_whole(hub, converted, tmp_path):
    flags = ["--model", converted(**KEY), "--output", tmp_path / "out", "--to", "granitemoe", "--verify-tokens", 256]
    done = emoe_command(hub, "export", *flags, "--push-to-hub", "someone/tiny", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/someone/tiny/commit/" in done.stdout
    assert hub.private == {"someone/tiny": True}
    local = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert hub.files == local
    assert {"README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"} <= set(local)
    assert len(hub.messages) == 1
    assert hub.messages[0].startswith("granitemoe, by emoe")


@pytest.mark.parametrize(
    ("repo", "environment", "message", "written"),
    [
        ("some one/tiny", {}, "--push-to-hub: 'some one/tiny' is not a repository's name", False),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "--push-to-hub: HF_HUB_OFFLINE is set", False),
        ("someone/tiny", {"HF_TOKEN": "hf_wrong"}, "complete in .*`emoe push --model .*out --repo someone/tiny`", True),
    ],
)
def test_an_export_is_not_made_in_vain(repo, environment, message, written, hub, converted, tmp_path):
    """What is wrong with an upload is said before the export where that can be known, and else the export stays."""
    flags = ["--model", converted(**KEY), "--output", tmp_path / "out", "--verify-tokens", 0, "--quiet"]
    done = emoe_command(hub, "export", *flags, "--push-to-hub", repo, **environment)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert (tmp_path / "out").exists() == written


def test_the_code_that_goes_along_is_what_checkpoints_carry():
    from emoe.exporting.hub import CODE
    from emoe.modeling import modeling_emoe, modeling_moduleformer

    assert {file.name for file in modeling_emoe.code_files()} | set(modeling_moduleformer.code_files()) == CODE


def test_a_converted_folder_is_pushed_with_its_code(hub, converted):
    source = converted(held_out_tokens=0)
    done = emoe_command(hub, "push", "--model", source, "--repo", "someone/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"].startswith(f"{hub.url}/someone/tiny/commit/")
    code = {f"{name}.py" for name in ("modeling_emoe", "ffn_emoe", "routing_emoe", "configuration_emoe", "portable")}
    assert code <= set(hub.files)
    assert "partition.safetensors" in hub.files
    assert hub.files["README.md"] == (source / "README.md").read_bytes()
    assert hub.private == {"someone/tiny": False}


def test_a_recovered_folder_is_pushed(hub, converted, text_file, tmp_path):
    flags = ["--model", converted(held_out_tokens=0), "--output", tmp_path / "out", "--text", text_file, "--steps", 1]
    flags += ["--tokens-per-step", 128, "--sequence-length", 64, "--held-out-tokens", 64, "--precision", "float32"]
    assert main(["recover", *map(str, flags), "--quiet"]) == 0
    done = emoe_command(hub, "push", "--model", tmp_path / "out", "--repo", "someone/tiny")
    assert done.returncode == 0, done.stderr
    local = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert set(hub.files) == set(local)
    rewritten = {name for name in local if hub.files[name] != local[name]}
    assert rewritten == {"emoe_config.yaml", "emoe_recover.json"}  # they name the texts
    assert b"recover" in hub.files["README.md"]
    tell_no_place(hub.files)


def tell_no_place(files: dict[str, bytes]) -> None:
    """Tests have all their files below one folder, whose path nobody else is to know."""
    assert [name for name, content in files.items() if tempfile.gettempdir().encode() + b"/" in content] == []


def test_the_user_s_own_files_stay(hub, converted, tmp_path):
    """Whatever else lies in the folder, links to elsewhere, and the places of models and texts on the disk."""
    folder = Path(shutil.copytree(converted(held_out_tokens=0), tmp_path / "model"))
    whole = {path.name for path in folder.iterdir()}
    (folder / "training").mkdir()
    others = ("passwords.txt", ".env", "notes.md", "train.py", "training/optimizer.pt", "training/config.json")
    for name in others:
        (folder / name).write_text("secret")
    (tmp_path / "secret").write_text("secret")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "vocab_file")):
        value = json.loads((folder / name).read_text()) | {key: str(tmp_path / "somewhere")}
        (folder / name).write_text(json.dumps(value))
    local = {name: (folder / name).read_bytes() for name in whole}
    done = emoe_command(hub, "push", "--model", folder, "--repo", "someone/tiny")
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == whole
    tell_no_place(hub.files)
    told = done.stdout.splitlines()[0]
    assert told.startswith(f"to someone/tiny: {len(whole)} files, ")
    assert "modeling_emoe.py, " in told
    assert "paths are cut to names in config.json, emoe_config.yaml, emoe_report.json, tokenizer_config.json; " in told
    assert told.endswith("; left out: .env, NOTICE, notes.md, passwords.txt, train.py, training/")
    uploaded, kept = (yaml.safe_load(files["emoe_config.yaml"]) for files in (hub.files, local))
    named = {"model": Path(kept["model"]).name, "calibration": [Path(kept["calibration"][0]).name]}
    assert uploaded == kept | named
    assert local == {name: (folder / name).read_bytes() for name in whole}


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama"}', "["])
def test_a_folder_that_is_not_ours_is_not_uploaded(config, tmp_path):
    for name, content in (("config.json", config), ("README.md", "# Mine"), ("passwords.txt", "secret")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="is not a checkpoint that emoe wrote"):
        push(tmp_path, "someone/tiny")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("/home/me/my texts/a.txt", "a.txt"),
        ("~/a.txt", "a.txt"),
        ("code=/home/me/my texts/code.txt", "code=code.txt"),
        ("--text: /home/me/a.txt was read twice, /home/me/b.txt once", "--text: a.txt was read twice, b.txt once"),
        ("folder /home/me/dense", "folder dense"),
        ("https://hub.example/someone/tiny", None),
        ("someone/tiny", None),
        ("texts/a.txt", None),
        ("10 tokens/s and/or 3", None),
        ("corpus:essays", None),
        ("/", None),
    ],
)
def test_paths_are_cut_to_names(text, named):
    assert names_only({"a": [text, 1, None]}) == {"a": [named or text, 1, None]}


@pytest.mark.parametrize(
    ("repo", "environment", "message"),
    [
        ("someone/tiny", {"HF_TOKEN": "hf_wrong"}, "the hub refused someone/tiny.*check HF_TOKEN"),
        ("some one/tiny", {}, "'some one/tiny' is not a repository's name"),
        ("someone/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_goes_wrong_is_one_line(repo, environment, message, hub, converted):
    done = emoe_command(hub, "push", "--model", converted(held_out_tokens=0), "--repo", repo, **environment)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert hub.files == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 5}', "{}"])
def test_a_damaged_report_is_refused_before_the_hub_is_asked(content, converted, tmp_path):
    folder = Path(shutil.copytree(converted(held_out_tokens=0), tmp_path / "model"))
    (folder / "emoe_export.json").write_text(content)
    with pytest.raises(UserError, match=r"emoe_export\.json"):
        push(folder, "someone/tiny")


def test_a_folder_without_a_card_is_not_uploaded(hub, converted, tmp_path):
    folder = Path(shutil.copytree(converted(held_out_tokens=0), tmp_path / "model"))
    (folder / "README.md").unlink()
    done = emoe_command(hub, "push", "--model", folder, "--repo", "someone/tiny")
    assert done.returncode == 2
    assert "has no model card" in done.stderr
    assert hub.private == {}
