"""IgLM (Shuai, Ruffolo and Gray, 2023), a GPT-2 of antibody sequences, as a plain folder.

Its package ships a pickled checkpoint and a word list. The checkpoint is read with ``weights_only`` (no code in it can
run) and saved as safetensors. Two deliberate differences from the package: the special tokens of the config, left at
GPT-2's 50256 although there are 33 words, are put right; and the tokenizer splits a sequence into its residues by
itself, so that plain text ``[HEAVY][HUMAN]EVQLV`` needs no spaces.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from emoe.assets.manifest import write_manifest
from emoe.runtime import atomic_directory


def import_iglm(checkpoint: Path, output: Path, *, licence_file: Path, source: str) -> Path:
    """Write ``output`` as a plain GPT-2 folder from the package's ``checkpoint`` folder; its parent holds vocab.txt.

    Args:
        checkpoint: folder with config.json and pytorch_model.bin.
        output: folder to make.
        licence_file: travels along, as that licence demands.
        source: one line of origin for the manifest.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = (checkpoint.parent / "vocab.txt").read_text(encoding="utf-8").split()
    ids = {word: index for index, word in enumerate(words)}
    fields = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    # The package ends generation at [CLS]; there is no token to begin with, a sequence starts at its chain token.
    fields.update(bos_token_id=None, eos_token_id=ids["[CLS]"], pad_token_id=ids["[PAD]"])
    model = GPT2LMHeadModel(GPT2Config.from_dict(fields))
    weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    # transformers 4.5 stored the causal masks as weights; they are constants today.
    weights = {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name != "lm_head.weight"]  # tied to the embedding
    if missing or unexpected:
        raise ValueError(f"{checkpoint}: weights missing {missing[:3]} or unexpected {unexpected[:3]}")
    model.tie_weights()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_residue_tokenizer(ids),
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=fields.get("n_positions", 512),
    )
    with atomic_directory(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.copyfile(licence_file, temporary / licence_file.name)
        write_manifest(temporary, source=source)
    return output


def _residue_tokenizer(ids: dict[str, int]):
    """One token a residue; bracketed words are matched whole; white space is dropped."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ids if word.startswith("[")])
    return tokenizer
