"""Uploads arrive whole, with their card; what goes wrong is one line. Against a stand-in on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub, stand_in
from support.routing import KEY

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
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert b"recover" in hub.files["README.md"]


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


def test_a_folder_without_a_card_is_not_uploaded(hub, tiny_llama):
    done = emoe_command(hub, "push", "--model", tiny_llama, "--repo", "someone/tiny")
    assert done.returncode == 2
    assert "has no model card" in done.stderr
    assert hub.private == {}
