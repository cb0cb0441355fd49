"""The packaged models themselves: they resolve, load through the Auto classes and make sense."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from emoe.assets import list_models, resolve_model
from emoe.assets.manifest import is_intact

pytestmark = pytest.mark.model


def test_smollm2_answers():
    resolved = resolve_model("smollm2-135m")
    assert (resolved.kind, resolved.licence) == ("package", "Apache-2.0")
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    model = AutoModelForCausalLM.from_pretrained(resolved.folder).eval()
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
        output = model.generate(**batch, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
    assert output[0, -1] == tokenizer.eos_token_id  # it stops by itself: the generation config names the right token


def test_minilm_knows_what_is_alike():
    resolved = resolve_model("all-minilm-l6-v2")
    tokenizer, model = AutoTokenizer.from_pretrained(resolved.folder), AutoModel.from_pretrained(resolved.folder).eval()
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in May."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD = model(**batch).last_hidden_state
    mask_BT1 = batch["attention_mask"][..., None]
    means_BD = torch.nn.functional.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=-1)
    likeness = means_BD @ means_BD.T
    assert torch.isfinite(hidden_BTD).all()
    assert likeness[0, 1] > 0.5 > likeness[0, 2]


def test_both_are_cached_now_and_whole():
    names = ("smollm2-135m", "all-minilm-l6-v2")
    folders = [resolve_model(name, verify=True).folder for name in names]
    rows = {row.alias: row.cached for row in list_models()}
    assert all(rows[name] for name in names)
    assert is_intact(folders[0], verify=True)
