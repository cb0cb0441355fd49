"""Text in, token blocks out."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny import tiny_tokenizer
from transformers import AutoTokenizer

from emoe.calibration.text import IN_DOMAIN, check_source, load_blocks, read_source
from emoe.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def blocks(sources, tokenizer, **changes):
    settings = {"length": 32, "calibration_tokens": 640, "held_out_tokens": 128, "seed": 0} | changes
    return load_blocks([str(s) for s in sources], tokenizer, **settings)


def test_sources(tmp_path, text_file):
    text = text_file.read_text()
    assert "".join(read_source(str(text_file))) == text
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first ")
    assert "".join(read_source(str(tmp_path))) == "first second"
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    assert "".join(read_source(str(tmp_path / "c.jsonl"))) == "one\ntwo\n"
    assert len("".join(read_source("builtin"))) > 300_000
    assert "def " in "".join(read_source("builtin-code"))
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match='line 1 is not a JSON object with a "text" field'):
        list(read_source(str(tmp_path / "c.jsonl")))


def test_datasets_are_another_source(tmp_path):
    """A folder or file wins; any other name goes to the `datasets` library, whose failure is one line."""
    with pytest.raises(UserError, match="no file, folder or reachable dataset 'no-such-owner/no-such-dataset'"):
        list(read_source("no-such-owner/no-such-dataset"))


def test_held_out_blocks_are_not_calibration_blocks(tokenizer, text_file):
    found = blocks([text_file], tokenizer)
    assert found.calibration.shape == (20, 32)
    (held_out,) = found.held_out.values()
    assert held_out.shape == (4, 32)
    seen = {tuple(row) for row in found.calibration.tolist()}
    assert not seen & {tuple(row) for row in held_out.tolist()}


def test_further_domains_are_held_out_too(tokenizer, text_file, tmp_path):
    (tmp_path / "zoo.txt").write_text("zebra " * 20_000)
    found = blocks([text_file], tokenizer, held_out=[str(tmp_path / "zoo.txt"), str(tmp_path / "zoo.txt")])
    assert list(found.held_out) == [IN_DOMAIN, "zoo", "zoo 2"]
    assert {tuple(part.shape) for part in found.held_out.values()} == {(4, 32)}
    assert found.digest != blocks([text_file], tokenizer).digest
    with pytest.raises(UserError, match=r"--held-out: .*empty.txt is empty"):
        (tmp_path / "empty.txt").write_text("")
        blocks([text_file], tokenizer, held_out=[str(tmp_path / "empty.txt")])


def test_calibration_text_is_not_held_out_again(tokenizer, text_file):
    """Blocks of it would be measured on that were calibrated on."""
    for same in (text_file, text_file.parent / ".." / text_file.parent.name / text_file.name):
        with pytest.raises(UserError, match=r"--held-out: .* is among --calibration, whose end is held out already"):
            blocks([text_file], tokenizer, held_out=[str(same)])
    with pytest.raises(UserError, match="--held-out: builtin is among --text"):
        blocks(["builtin-code", "builtin"], tokenizer, held_out=["builtin"], flag="--text")


def test_sources_mix_equally(tokenizer, text_file, tmp_path):
    (tmp_path / "other.txt").write_text("zebra " * 20_000)
    found = blocks([text_file, tmp_path / "other.txt"], tokenizer)
    only = blocks([tmp_path / "other.txt"], tokenizer).calibration
    repeated = {tuple(row) for row in only.tolist()}
    assert sum(tuple(row) in repeated for row in found.calibration.tolist()) == len(found.calibration) // 2


def test_seed_draws_the_blocks(tokenizer, text_file):
    first, same, other = (blocks([text_file], tokenizer, seed=s) for s in (0, 0, 1))
    assert first.digest == same.digest != other.digest
    assert torch.equal(first.held_out[IN_DOMAIN], other.held_out[IN_DOMAIN])


def test_a_tokenizer_gets_its_special_tokens(tokenizer, text_file):
    class WithStart:
        """Puts <s> before a text, as Llama's tokenizer does."""

        def __call__(self, text, add_special_tokens=True, **_):
            found = tokenizer(text, add_special_tokens=False)
            if add_special_tokens:
                found["input_ids"] = [1, *found["input_ids"]]
            return found

    found = blocks([text_file], WithStart())
    assert (found.calibration[:, 0] == 1).all()
    assert (found.calibration[:, 1:] != 1).all()


def test_one_endless_line(tokenizer, tmp_path):
    """Ten megabytes without a line break are read piece by piece, and no further than needed."""
    (tmp_path / "line.txt").write_text("a model " * 1_250_000)
    assert blocks([tmp_path / "line.txt"], tokenizer).calibration.shape == (20, 32)


def test_a_dataset_that_sounds_a_little_like_the_built_in_text_is_not_refused():
    check_source("multi_news")
    with pytest.raises(UserError, match="did you mean 'builtin'"):
        check_source("builtn")
