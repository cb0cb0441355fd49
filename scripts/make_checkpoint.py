"""Write a checkpoint with the shape of a known model and made-up weights, to try a conversion's speed and memory on.

    python scripts/make_checkpoint.py --like llama2-7b --output /tmp/llama2-7b        # 12.6 GiB
    python scripts/make_checkpoint.py --like llama2-7b --layers 4 --output /tmp/four
    python scripts/make_checkpoint.py --like gpt2 --dtype float32 --output /tmp/gpt2

Sharded safetensors of bf16 values, a layer a shard, and a real tokenizer whose vocabulary fits. Each matrix is low-rank
plus noise, and the neurons of an FFN come in families: rows of the input matrix share a direction with the others of
their family, so that clustering finds groups and calibration finds neurons that fire together. The model's text is
nonsense.

Every tensor is drawn from its own name and the seed: a short checkpoint has the first layers of a long one.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from pathlib import Path

import torch
from rich.progress import track
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emoe.assets import ALIASES, Alias, resolve_model
from emoe.checkpoint.writer import ShardWriter
from emoe.cli.progress import silence_libraries
from emoe.errors import UserError, nearest
from emoe.families import FamilySpec, family
from emoe.modeling.auto import stock_classes
from emoe.runtime import atomic_directory, require_space, write_text

TOKENIZERS = (("smollm2-135m", 49152), ("all-minilm-l6-v2", 30522))
"""Tokenizers that come in packages, and their entries; the first that fits the vocabulary is taken."""

RANK = 64
NEURONS_A_FAMILY = 48
LOW_RANK_SHARE, FAMILY_SHARE = 0.3, 0.4
"""Shares of a row's variance; the rest is noise."""


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--like", required=True, metavar="ALIAS", help="shape to take; `emoe models` lists the aliases")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer or more layers than the model has")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="the values are the same")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        make(arguments.like, arguments.output, layers=arguments.layers, seed=arguments.seed, dtype=arguments.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def make(like: str, output: Path, *, layers: int | None = None, seed: int = 0, dtype: str = "bfloat16") -> None:
    """Write the checkpoint; `UserError` names the flag that cannot be."""
    alias = ALIASES.get(like.lower())
    if alias is None:
        raise UserError(f"--like: unknown alias '{like}'{nearest(like, ALIASES)}; `emoe models` lists them")
    if layers is not None and layers < 1:
        raise UserError(f"--layers: {layers} must be at least 1")
    if output.exists():
        raise UserError(f"--output: {output} exists; choose another folder")
    spec = family(alias.family)
    config = CONFIG_MAPPING[alias.family].from_dict(alias.shape if layers is None else with_layers(alias, layers))
    tokenizer = tokenizer_for(config)
    shapes = parameter_shapes(spec, config)
    stored = getattr(torch, dtype)
    require_space(output.parent, stored.itemsize * sum(map(math.prod, shapes.values())), "--output")
    shards = by_layer(shapes, f"{spec.base_prefix}.{spec.layers}.")
    with atomic_directory(output) as folder:
        writer = ShardWriter(folder, len(shards))
        for number in track(range(len(shards)), description=f"writing {len(shards)} shards"):
            values = {name: tensor(name, shapes[name], spec, seed).to(stored) for name in shards[number]}
            writer.write(number, values)
        writer.finish()
        tokenizer.save_pretrained(folder)
        config.architectures, config.dtype = [stock_classes(alias.family)["AutoModelForCausalLM"]], dtype
        write_text(folder / "config.json", config.to_json_string(use_diff=True))


def with_layers(alias: Alias, layers: int) -> dict:
    """The alias's shape with another number of layers; what a configuration says of each layer follows from that."""
    names = CONFIG_MAPPING[alias.family].attribute_map
    shape = dict(alias.shape) | {names.get("num_hidden_layers", "num_hidden_layers"): layers}
    if "attention_types" in shape:  # GPT-Neo: kinds in turn, and how often the turn is repeated
        kinds = shape["attention_types"][0][0]
        shape["attention_types"] = [[[kinds[i % len(kinds)] for i in range(layers)], 1]]
    return shape


def parameter_shapes(spec: FamilySpec, config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, from the stock model on the meta device; tied ones once."""
    from transformers import AutoModelForCausalLM

    if spec.encoder:
        raise UserError(f"--like: {spec.model_type} is an encoder; only language models are made")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def by_layer(names, layers: str) -> list[list[str]]:
    """Names in shards: what stands outside the layers first, then a layer each."""
    groups: dict[int, list[str]] = {}
    for name in names:
        number = int(name.removeprefix(layers).split(".")[0]) if name.startswith(layers) else -1
        groups.setdefault(number, []).append(name)
    return [groups[number] for number in sorted(groups)]


def tensor(name: str, shape: tuple[int, ...], spec: FamilySpec, seed: int) -> torch.Tensor:
    """Values of a parameter, bf16: ones for norms, zeros for biases, structured rows for matrices."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    conv = spec.transposed
    rows, columns = shape[::-1] if conv else shape
    value = structured_rows(rows, columns, any(f".{part}." in name for part in (spec.key, spec.up)), generator)
    value *= 1 / math.sqrt(columns)
    return (value.T if conv else value).bfloat16().contiguous()


def structured_rows(rows: int, columns: int, families: bool, generator: torch.Generator) -> torch.Tensor:
    """(rows, columns) of variance 1: low rank, with `families` a direction for each group of rows, and noise."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    share = LOW_RANK_SHARE + FAMILY_SHARE * families
    value = draw(rows, columns).mul_(math.sqrt(1 - share))
    value.addmm_(draw(rows, RANK), draw(RANK, columns), alpha=math.sqrt(LOW_RANK_SHARE / RANK))
    if families:
        count = max(1, rows // NEURONS_A_FAMILY)
        member = torch.randint(count, (rows,), generator=generator)
        directions = draw(count, columns).mul_(math.sqrt(FAMILY_SHARE))
        for start in range(0, rows, 1024):
            value[start : start + 1024] += directions[member[start : start + 1024]]
    return value


def tokenizer_for(config):
    """Tokenizer of a packaged model with no id that the embedding lacks; the config gets its special tokens.

    In place of Llama 2's own that is BERT's, which lower-cases: good enough to be read by a model that knows nothing.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fitting = [alias for alias, entries in TOKENIZERS if entries <= config.vocab_size]
    if not fitting:
        raise UserError(f"--like: no packaged tokenizer has as few as {config.vocab_size} entries")
    found = AutoTokenizer.from_pretrained(resolve_model(fitting[0]).folder)
    special = {name: value for name, value in found.special_tokens_map.items() if isinstance(value, str)}
    inputs = ["input_ids", "attention_mask"]  # a language model takes no token types
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found.backend_tokenizer, model_input_names=inputs, **special)
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    config.eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


if __name__ == "__main__":
    main()
