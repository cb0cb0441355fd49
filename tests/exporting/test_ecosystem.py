"""Adapters, quantisers, trainers and the evaluation harness take a converted model as the Llama it is made of.

Each needs a package of the `quantisers`, `trl` or `lm-eval` extras, which the `test` extra brings; else it is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from support.routing import KEY
from support.tiny import TEXT, VOCAB

TOKENS = torch.randint(5, VOCAB, (4, 24), generator=torch.Generator().manual_seed(2))
LINEARS = {
    "ffn": ["gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits.float()


@pytest.mark.parametrize("where", LINEARS)
@pytest.mark.parametrize("given", [{"held_out_tokens": 0}, KEY], ids=["default", "average-key"])
def test_lora_trains_saves_loads_and_merges(where, given, converted, tmp_path):
    peft = pytest.importorskip("peft")
    source = converted(**given)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS[where], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(source), settings)
    before = logits(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model)
    assert (trained - before).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(source), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), trained)
    merged = again.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, rtol=0, atol=1e-3)


def quantised_is_quantised_dense(converted_model, dense_model, tolerance: float) -> None:
    """Scales belong to rows or whole matrices, so that reordering neurons commutes with quantising: with all experts on
    the quantised converted model is the quantised dense one. With fewer it still computes, and something else."""
    assert not converted_model.model.layers[0].mlp.plain  # no kernel may read such a weight as a matrix
    fewer = logits(converted_model)
    assert torch.isfinite(fewer).all()
    converted_model.set_top_k(8)
    torch.testing.assert_close(logits(converted_model), logits(dense_model), rtol=0, atol=tolerance)
    assert (fewer - logits(converted_model)).abs().max() > 0.1


def test_torchao_int8_weights(converted, tiny_llama):
    torchao = pytest.importorskip("torchao.quantization")
    models = load(converted(**KEY)), load(tiny_llama)
    before = logits(models[1])
    for model in models:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert type(models[0].model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert (logits(models[1]) - before).abs().max() > 1e-2  # quantised it is
    quantised_is_quantised_dense(*models, tolerance=1e-3)


def test_bitsandbytes_int8(converted, tiny_llama):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    try:
        models = [load(folder, quantization_config=settings) for folder in (converted(held_out_tokens=0), tiny_llama)]
        logits(models[1])
    except (ImportError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    quantised_is_quantised_dense(*models, tolerance=0.1)


def test_sft_trainer_of_trl_trains_a_converted_model(converted, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    source = converted(held_out_tokens=0)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, max_length=32,
        report_to=[], logging_steps=1, use_cpu=True, save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=load(source),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"text": [TEXT] * 8}),
        processing_class=transformers.AutoTokenizer.from_pretrained(source),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["{{{{first}}}}", "{{{{second}}}}"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
results = []
for arguments in sys.argv[2:]:
    found = simple_evaluate(model="hf", model_args=arguments, tasks=["tiny_choice"], task_manager=manager, device="cpu")
    answers = [sample["filtered_resps"] for sample in found["samples"]["tiny_choice"]]
    results.append([found["results"]["tiny_choice"]["acc,none"], answers])
print(json.dumps(results))
"""


def test_lm_eval_scores_a_converted_folder(converted, tiny_llama, tmp_path):
    """At K = E the harness gives every answer the dense model's likelihood, at the model's own K another."""
    pytest.importorskip("lm_eval", exc_type=ImportError)
    words = TEXT.split()
    rows = [
        {"text": " ".join(words[i : i + 4]), "first": words[i + 4], "second": words[(i * 7) % 20], "label": i % 2}
        for i in range(20)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    source = converted(held_out_tokens=0)
    models = [
        f"pretrained={tiny_llama}",
        f"pretrained={source},trust_remote_code=True,num_experts_per_tok=8",
        f"pretrained={source},trust_remote_code=True",
    ]
    command = [sys.executable, "-c", EVALUATE, str(tmp_path / "tasks"), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    dense, whole, own = json.loads(done.stdout.strip().splitlines()[-1])
    assert whole[0] == dense[0]
    for ours, theirs in zip(whole[1], dense[1], strict=True):
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert max(abs(a[0][0] - b[0][0]) for a, b in zip(own[1], dense[1], strict=True)) > 0.1
