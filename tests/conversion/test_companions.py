"""Files that go along from a source: a link in a stranger's folder does not carry off a file of the user's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.labelled import write_task

import emoe
from emoe.checkpoint.companions import check_companions
from emoe.cli.main import main
from emoe.errors import UserError


def commands(dense: Path, converted: Path, text: Path, task: Path) -> dict[str, list]:
    """Every verb that takes files along: what to copy, and how to go on."""
    training = ["--text", text, "--steps", 1, "--sequence-length", 64, "--held-out-tokens", 64]
    return {
        "convert": [dense, "--calibration", text, "--experts", 8, "--held-out-tokens", 0],
        "export": [converted, "--verify-tokens", 0],
        "prune": [converted, "--method", "random", "--keep", 0.5],
        "extend": [converted, "--experts", 1],
        "tune": [converted, *training],
        "recover": [converted, *training],
        "finetune": [converted, "--task", task],
    }


@pytest.mark.parametrize("verb", commands(Path(), Path(), Path(), Path()))
def test_a_link_out_of_the_folder_is_refused_at_once(verb, tiny_llama, converted_llama, text_file, tmp_path, capsys):
    source, *flags = commands(tiny_llama, converted_llama, text_file, write_task(tmp_path / "task"))[verb]
    model = Path(shutil.copytree(source, tmp_path / "model"))
    (tmp_path / "secret").write_text("of the user's")
    (model / "LICENSE").symlink_to("../secret")
    flags = ["--model", model, "--output", tmp_path / "out", *flags, "--quiet"]
    assert main([verb, *map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--model: {model / 'LICENSE'} is a link to {tmp_path / 'secret'}, outside of the model's folder" in line
    assert not (tmp_path / "out" / "LICENSE").exists()


@pytest.fixture
def snapshot(tiny_llama, tmp_path) -> Path:
    """A model as the cache of huggingface_hub has it."""
    folder = tmp_path / "models--someone--tiny" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    blobs = folder.parents[1] / "blobs"
    shutil.copytree(tiny_llama, blobs)
    (blobs / "LICENSE").write_text("do as you like")
    for file in list(blobs.iterdir()):
        file.rename(blobs / f"digest-{file.name}")
        (folder / file.name).symlink_to(f"../../blobs/digest-{file.name}")
    return folder


@pytest.mark.parametrize("way", ["snapshot", "by a link to it"])
def test_snapshots_of_the_hub_are_links_and_welcome(way, snapshot, tiny_llama, settings, tmp_path):
    if way != "snapshot":
        (tmp_path / "model").symlink_to(snapshot)
        snapshot = tmp_path / "model"
    emoe.convert(str(snapshot), output=tmp_path / "out", **settings | {"held_out_tokens": 0})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


@pytest.mark.parametrize("where", ["snapshots", "blobs"])
def test_what_only_looks_like_a_snapshot_is_no_way_out(where, snapshot, tmp_path):
    if where == "snapshots":
        (snapshot / "NOTICE").symlink_to("../../../secret")
        (tmp_path / "secret").write_text("of the user's")
    else:
        blobs = snapshot.parents[1] / "blobs"
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to"):
        check_companions(snapshot)


def test_links_within_the_folder_are_followed(tiny_llama, tmp_path):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "LICENSE").symlink_to("config.json")
    check_companions(model)
