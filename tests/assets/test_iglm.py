"""The IgLM conversion on a random checkpoint of the same make; the real one has a licence that tests do not accept."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from emoe.assets.iglm import import_iglm
from emoe.assets.manifest import is_intact

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY", "[CAMEL]", "[HUMAN]", "[MOUSE]"]
WORDS += ["[RABBIT]", "[RAT]", "[RHESUS]", "[HEAVY]", "[LIGHT]"]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "trained_models" / "IgLM-S"
    folder.mkdir(parents=True)
    (folder.parent / "vocab.txt").write_text("\n".join(WORDS))
    (folder.parent / "LICENSE.md").write_text("non-commercial")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, vocab_size=len(WORDS))
    model = GPT2LMHeadModel(config).eval()
    fields = {**config.to_dict(), "_name_or_path": "trained_models/x", "bos_token_id": 50256, "eos_token_id": 50256}
    (folder / "config.json").write_text(json.dumps(fields))
    state = model.state_dict()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)  # as transformers 4.5 stored it
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    return folder, model


def test_the_folder_is_the_checkpoint(checkpoint, tmp_path):
    folder, source = checkpoint
    output = import_iglm(folder, tmp_path / "out", licence_file=folder.parent / "LICENSE.md", source="package")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    batch = tokenizer("[HEAVY][HUMAN]EVQLV", return_tensors="pt")
    assert batch.input_ids[0].tolist() == [WORDS.index(word) for word in ["[HEAVY]", "[HUMAN]", *"EVQLV"]]
    assert tokenizer.decode(batch.input_ids[0]) == "[HEAVY][HUMAN]EVQLV"
    assert tokenizer("E V").input_ids == tokenizer("EV").input_ids
    assert tokenizer("EB").input_ids[1] == tokenizer.unk_token_id  # B stands for no residue in this vocabulary
    with torch.no_grad():
        torch.testing.assert_close(model(batch.input_ids).logits, source(batch.input_ids).logits)
    assert model.config.eos_token_id == WORDS.index("[CLS]") and model.config.bos_token_id is None
    assert (output / "LICENSE.md").is_file() and is_intact(output, verify=True)
    assert not list(output.glob("*.bin"))
