"""A tokenizer for pre-training: another model's, or a byte-level BPE trained on the corpora."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from emoe.calibration.text import read_tokenizer
from emoe.config import PretrainConfig
from emoe.errors import UserError
from emoe.pretraining.text import Domain, pieces

END, PADDING = "<|endoftext|>", "<|padding|>"

TRAINING_PIECES = 256
"""Pieces of each domain that a tokenizer is trained on, 4 MiB: more changes few merges and takes minutes."""


def load_tokenizer(config: PretrainConfig, domains: list[Domain], folder: Path) -> Any:
    """The tokenizer of these settings; a trained one is kept in `folder`, where a resumed run finds it.

    Raises:
        UserError: there is no such tokenizer, none that works, or it is not a fast one.
    """
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder, "give another folder", "--output")
    if config.tokenizer == "train":
        tokenizer = train_tokenizer(domains, config.vocabulary, config.held_out_share)
    else:
        tokenizer = _existing(config.tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _existing(name: str) -> Any:
    from emoe.assets import resolve_model

    path = Path(os.path.expanduser(name))
    try:
        folder = path if (path / "tokenizer.json").is_file() else resolve_model(name).folder
    except UserError as error:
        raise UserError(str(error).replace("--model", "--tokenizer", 1)) from None
    tokenizer = read_tokenizer(folder, "give another, or 'train'", "--tokenizer")
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer: {name} has no tokenizer.json; give a fast tokenizer, or 'train'")
    tokenizer.chat_template = None
    return tokenizer


def train_tokenizer(domains: list[Domain], vocabulary: int, held_out_share: float) -> Any:
    """A byte-level BPE (as GPT-2's) of `vocabulary` tokens; every domain has an equal say, nothing held out is seen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for domain in domains:
            own = (text for apart, text in pieces(domain, held_out_share) if not apart)
            yield from itertools.islice(own, TRAINING_PIECES)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PADDING, clean_up_tokenization_spaces=False
    )
