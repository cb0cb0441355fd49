"""A full disk is one line that names --output, whichever file it shows at and whoever writes it."""

from __future__ import annotations

import errno
import re

import pytest
from safetensors import SafetensorError
from support.drill import Verb
from support.scripts import SCRIPTS

from emoe.disk import full_disk_told, remove_folder
from emoe.errors import UserError
from emoe.runtime import atomic_directory, atomic_write

VERBS = {verb.name: verb for verb in Verb.read(SCRIPTS / "fault_drill.yaml")}
FULL = (errno.ENOSPC, "No space left on device")


def test_of_a_linked_folder_the_link_goes(tmp_path):
    """Twice over, since a link that stayed would be in the way of the next one."""
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        (tmp_path / "seed-0").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        remove_folder(tmp_path / "seed-0")
        assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_what_cannot_be_read_is_not_told_as_a_full_disk(tmp_path):
    output, denied = tmp_path / "out", (errno.EACCES, "Permission denied")
    others = [
        PermissionError(*denied, "/etc/text.txt"),
        PermissionError(*denied, str(tmp_path / "model" / "config.json")),
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "model")),
        SafetensorError("Error while deserializing header: invalid header length"),
        SafetensorError("No such file or directory (os error 2)"),
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
        UserError("--text: cannot be read (os error 28)"),
    ]
    for error in others:
        with pytest.raises(type(error)) as caught, full_disk_told(output):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(*FULL), "make room and add --resume"),
        (OSError(*FULL, "/usr/lib/python/portable.py", None, "{output}/portable.py"), "make room and add --resume"),
        (Exception("File too large (os error 27)"), "make room and add --resume"),  # of tokenizers
        (PermissionError(errno.EACCES, "Permission denied", "{output}/a"), "choose another place"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "{parent}/.out.emoe-x"), "choose another place"),
    ],
)
def test_what_cannot_be_written_is_told_of_the_output(error, hint, tmp_path):
    output = tmp_path / "out"
    for name in ("filename", "filename2"):
        if getattr(error, name, None):
            setattr(error, name, getattr(error, name).format(output=output, parent=tmp_path))
    told = rf"^--output: cannot write {output} \([^/]*\); {hint}$"
    with pytest.raises(UserError, match=told), full_disk_told(output, "add --resume"):
        raise error


@pytest.mark.parametrize("write", [atomic_write, atomic_directory])
def test_a_full_cache_is_not_told_as_a_full_output(write, tmp_path):
    """The system itself names no file."""
    place = tmp_path / "cache" / "model"
    place.parent.mkdir()
    with pytest.raises(OSError, match="cache/model"), full_disk_told(tmp_path / "out"), write(place):
        raise OSError(*FULL)


@pytest.mark.parametrize(
    ("verb", "limits"),
    [
        ("pretrain", {2_000: "os error", 24_000: "I/O error", 90_000: "inline_container"}),
        ("finetune", {2_000: "File too large", 90_000: "I/O error", 200_000: "inline_container"}),
        ("tune", {12_000: "File too large"}),
    ],
)
def test_a_full_disk_in_training_is_one_line(verb, limits, nursery, inputs, tmp_path):
    """Tokenizer, copied modules, weights of a state by safetensors, its optimizer by torch. With room, it goes on."""
    if verb == "pretrain":  # packs its text, if no other test has yet
        assert nursery.run(*VERBS[verb].command.format(**inputs, output=tmp_path / "x").split()).status == 0
    for limit, reason in limits.items():
        output = tmp_path / f"out-{limit}"
        call = VERBS[verb].command.format(**inputs, output=output).split()
        done = nursery.run(*call, RLIMIT_FSIZE=limit)
        assert done.refused, done.text
        assert f"--output: cannot write {output} (" in done.text
        assert "make room and add --resume" in done.text
        assert reason in done.text
    done = nursery.run(*call, "--resume")
    assert done.status == 0, done.text


def test_a_full_cache_in_packing_text_is_one_line(nursery, inputs, tmp_path):
    call = VERBS["pretrain"].command.replace("--sequence-length 32", "--sequence-length 16")  # packed by no other test
    done = nursery.run(*call.format(**inputs, output=tmp_path / "out").split(), RLIMIT_FSIZE=15_000)
    assert done.refused, done.text
    told = "EMOE_HOME: cannot write .*/home/packed (.*File too large.*); make room and add --resume"
    assert re.search(told, done.text)
