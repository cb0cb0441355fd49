"""Corpora to packed sequences: read, split, tokenised and cut once, then mapped from disk.

A domain's text is cut into pieces of some pages; now and then one is held out, so that what a model is measured on
comes from all over the domain and is never in what it reads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from emoe.assets.corpora import CORPORA, corpus_files, read_corpus
from emoe.calibration.text import read_source
from emoe.disk import full_disk_told
from emoe.errors import UserError, nearest
from emoe.runtime import cache_home

PIECE = 1 << 14
"""Characters of a piece, the unit of what is held out; documents end one early."""

BATCH = 64
"""Pieces tokenised at a time: the tokenizer shares them among its threads."""


@dataclass(frozen=True)
class Domain:
    """One domain to train on."""

    name: str
    source: str | None
    """What `read_source` takes; None for the built-in corpus of this name."""

    def texts(self) -> Iterator[str]:
        """Documents, or large parts of them, in a fixed order."""
        return read_corpus(self.name) if self.source is None else read_source(self.source, "--corpus")

    def digest(self) -> str:
        """Changes with the files; of a hub dataset only its name is known."""
        if self.source is None:
            files = corpus_files(self.name)
        else:
            path = Path(os.path.expanduser(self.source))
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps([self.source, facts]).encode()).hexdigest()


def parse_domains(values: list[str]) -> list[Domain]:
    """Domains from ``--corpus``.

    Raises:
        UserError: none is given, one twice, or one that is neither built in nor a name with a path.
    """
    if not values:
        raise UserError(f"--corpus: missing; give name=path, or a built-in corpus: {', '.join(CORPORA)}")
    domains = []
    for value in values:
        name, equals, source = value.partition("=")
        if not equals and name not in CORPORA:
            raise UserError(
                f"--corpus: '{value}' is no built-in corpus{nearest(value, CORPORA)}; known: {', '.join(CORPORA)}, "
                "or give name=path"
            )
        if equals and not (name and source):
            raise UserError(f"--corpus: '{value}' wants a name and a path, name=path")
        domains.append(Domain(name, source if equals else None))
    names = [domain.name for domain in domains]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--corpus: the domain '{twice}' is given twice; name each domain once")
    return domains


def pieces(domain: Domain, held_out_share: float) -> Iterator[tuple[bool, str]]:
    """(held out?, text) in a fixed order. Held out is a piece whenever less than the share has been so far."""
    read = kept_apart = 0
    for text in domain.texts():
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            held_out = kept_apart < held_out_share * read
            read += len(piece)
            kept_apart += len(piece) * held_out
            yield held_out, piece


def spread(rows: Iterable[Any], wanted: int) -> list[Any]:
    """`wanted` of the rows, evenly from the first to the last; fewer if there are. Keeps twice as many meanwhile."""
    kept: list[Any] = []
    stride = 1
    for number, row in enumerate(rows):
        if number % stride == 0:
            kept.append(row)
            if len(kept) == 2 * wanted:
                kept, stride = kept[::2], 2 * stride
    return [kept[i * len(kept) // wanted] for i in range(wanted)] if len(kept) > wanted else kept


def _sequences(
    domain: Domain, tokenizer: Any, length: int, held_out: bool, share: float, most: int | None, read: int | None
) -> Iterator[dict[str, list[int]]]:
    """Packed sequences of one part of a domain; behind each piece an end-of-text token. See `load_domain`."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    texts = (piece for apart, piece in pieces(domain, share) if apart == held_out)

    def cut() -> Iterator[dict[str, list[int]]]:
        left: list[int] = []
        while batch := list(itertools.islice(texts, BATCH)):
            for row in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
                left += [*row, *end]
            whole = len(left) // length * length
            yield from ({"input_ids": left[start : start + length]} for start in range(0, whole, length))
            left = left[whole:]

    sequences = lambda tokens: None if tokens is None else -(-tokens // length)  # noqa: E731
    if held_out and most is not None:
        yield from spread(itertools.islice(cut(), sequences(read)), sequences(most))
    else:
        yield from itertools.islice(cut(), sequences(most))


def load_domain(
    domain: Domain,
    tokenizer: Any,
    *,
    length: int,
    held_out: bool,
    share: float,
    most: int | None = None,
    read: int | None = None,
) -> datasets.Dataset:
    """Packed sequences, a column ``input_ids``; made once and then mapped from ``$EMOE_HOME/packed``.

    Args:
        length: tokens a sequence.
        held_out: the part to measure on, or the one to train on.
        share: of the text that is held out.
        most: tokens that are taken: the first of the part to train on, of the held-out part some from all over; None
            for all.
        read: held-out tokens after which reading stops; None for the whole domain.

    Raises:
        UserError: there is not even one sequence, or no room for them.
    """
    settings = (domain.name, domain.digest(), _tokenizer_digest(tokenizer), length, held_out, share, most, PIECE)
    settings += (read, "spread") if held_out else ()
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    keywords = {"domain": domain, "tokenizer": tokenizer, "length": length, "held_out": held_out}
    keywords |= {"share": share, "most": most, "read": read}
    try:
        return _packed(keywords, fingerprint)
    except ValueError:  # what the library raises when nothing has been generated
        if next(_sequences(**keywords), None) is not None:
            raise
        if not any(piece.strip() for _, piece in pieces(domain, share)):
            raise UserError(f"--corpus: {domain.name} holds no text") from None
        raise UserError(
            f"--corpus: {domain.name} has not one sequence of {length} tokens "
            f"{'held out' if held_out else 'to train on'}; give more text or a lower --sequence-length"
        ) from None


def _packed(keywords: dict[str, Any], fingerprint: str) -> datasets.Dataset:
    """`_sequences` of these arguments, in the cache under this name."""
    cache = cache_home() / "packed"
    with full_disk_told(cache, "add --resume", flag="EMOE_HOME"):
        try:
            return datasets.Dataset.from_generator(
                _sequences,
                features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
                gen_kwargs=keywords,
                cache_dir=str(cache),
                fingerprint=fingerprint,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None


def digest_of_sequences(part: datasets.Dataset, held_out: torch.Tensor) -> str:
    """Hex sha256 over the token ids that a domain is trained on, and over those that it is measured on."""
    digest = hashlib.sha256()
    for rows in part.with_format("numpy").iter(batch_size=1024):
        digest.update(np.asarray(rows["input_ids"], dtype=np.int64).tobytes())
    digest.update(held_out.numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def mixed(parts: list[datasets.Dataset], mix: str, seed: int) -> datasets.Dataset:
    """One dataset of several domains: all of each, small ones repeated if they are drawn equally."""
    if len(parts) == 1:
        return parts[0]
    if mix == "size":
        return datasets.concatenate_datasets(parts)
    equal = [1 / len(parts)] * len(parts)
    return datasets.interleave_datasets(parts, probabilities=equal, seed=seed, stopping_strategy="all_exhausted")
