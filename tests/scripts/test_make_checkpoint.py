"""Made-up checkpoints with the shape of known models load as what they say they are."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from support.scripts import SCRIPTS, script
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emoe.assets import ALIASES
from emoe.families import family

make_checkpoint = script("make_checkpoint")


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    make_checkpoint.make("smollm2-135m", folder, layers=2)
    return folder


def test_transformers_loads_it(two_layers):
    model = AutoModelForCausalLM.from_pretrained(two_layers)
    tokenizer = AutoTokenizer.from_pretrained(two_layers)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 1536)
    encoded = tokenizer("The knee bends.", return_tensors="pt")
    assert model.generate(**encoded, max_new_tokens=2, do_sample=False).shape[1] > encoded.input_ids.shape[1]


def test_rows_come_in_families(two_layers):
    """Some rows of the input matrix are much more alike than those of plain noise would be; not those of attention."""
    with safe_open(two_layers / "model-00002-of-00003.safetensors", framework="pt") as file:
        matrices = {n: file.get_tensor(n).float() for n in file.keys() if n.endswith("proj.weight")}  # noqa: SIM118

    def alike(name):
        rows = torch.nn.functional.normalize(matrices[f"model.layers.0.{name}.weight"], dim=1)
        return (rows @ rows.T).fill_diagonal_(0).amax(1).mean()

    assert alike("mlp.gate_proj") > 0.5 > alike("self_attn.q_proj")


def test_a_short_checkpoint_has_the_first_layers_of_a_long_one(two_layers, tmp_path):
    make_checkpoint.make("smollm2-135m", tmp_path / "one", layers=1, dtype="float32")
    name = "model.layers.0.mlp.down_proj.weight"
    found = []
    for folder, shard in ((two_layers, "model-00002-of-00003"), (tmp_path / "one", "model-00002-of-00002")):
        with safe_open(folder / f"{shard}.safetensors", framework="pt") as file:
            found.append(file.get_tensor(name))
    assert found[1].dtype == torch.float32  # and the values are those of bf16
    assert torch.equal(found[0].float(), found[1])


@pytest.mark.parametrize("name", [n for n, alias in ALIASES.items() if not family(alias.family).encoder])
def test_any_shape_may_have_another_number_of_layers(name):
    """Through JSON and back, as a reader will see it: lists with an entry a layer must have the new length."""
    alias = ALIASES[name]
    made = CONFIG_MAPPING[alias.family].from_dict(make_checkpoint.with_layers(alias, 3))
    read = CONFIG_MAPPING[alias.family].from_dict(json.loads(made.to_json_string(use_diff=True)))
    assert read.num_hidden_layers == 3
    assert len(getattr(read, "layer_types", None) or read.to_dict().get("attention_layers") or range(3)) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--like", "lama2-7b"), "--like: unknown alias 'lama2-7b' (did you mean 'llama2-7b'?)"),
        (("--like", "llama2-7b", "--layers", "0"), "--layers: 0 must be at least 1"),
        (("--like", "bert-base"), "--like: bert is an encoder"),
        (("--like", "iglm"), "--like: no packaged tokenizer has as few as 33 entries"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    command = [sys.executable, SCRIPTS / "make_checkpoint.py", *flags, "--output", tmp_path / "out"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 2 and message in child.stderr.splitlines()[-1] and "Traceback" not in child.stderr
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(two_layers):
    before = sorted(two_layers.iterdir())
    with pytest.raises(make_checkpoint.UserError, match="exists; choose another"):
        make_checkpoint.make("smollm2-135m", two_layers, layers=1)
    assert sorted(two_layers.iterdir()) == before
