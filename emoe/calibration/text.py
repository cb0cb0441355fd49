"""Text for calibration: from files, folders, datasets or the built-in default to blocks of tokens.

A block is `length` tokens of running text, beginning with the special tokens that the tokenizer itself would put there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emoe.assets.corpora import CORPORA, read_corpus
from emoe.errors import UserError, nearest

IN_DOMAIN = "calibration domain"
"""Name of the held-out text that comes from the calibration sources."""

CORPUS = "corpus:"
"""Prefix of the names of built-in corpora."""

BUILTIN_CODE = "builtin-code"
"""A second text that is on every machine: the source code of Python's standard library."""

BUILTIN = "builtin"
"""Name of the default text: the reference documentation that comes with every CPython (``pydoc_data.topics``)."""

PIECE = 1 << 16
"""Characters tokenised at a time, so that a file of one endless line costs no more memory than any other."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
"""Patterns of the files, one of which every tokenizer has."""

POOL = 4
"""Blocks read for each block used: calibration is drawn at random from all but the end, held-out text is the end."""

MINIMUM_TOKENS = 2048
"""Fewer calibration tokens than this do not tell neurons apart."""


@dataclass(frozen=True)
class TokenBlocks:
    """Calibration and held-out tokens, each (blocks, length) int64, and where they came from."""

    calibration: torch.Tensor
    held_out: dict[str, torch.Tensor]
    """By domain; the first is that of the calibration text."""
    digest: str
    """Hex sha256 over the token ids."""


def read_tokenizer(folder: Path, advice: str = "copy or fetch the model again", flag: str = "--model") -> Any:
    """The tokenizer in a model's folder; one that asks to run code of its own is none.

    Raises:
        UserError: there is none that works; ``advice`` says what to do, ``flag`` where the folder was named.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            problem = "there is none"  # transformers names the files that it tried, of which it has found none
        raise UserError(f"{flag}: no usable tokenizer in {folder} ({problem}); {advice}") from None


def check_source(source: str, flag: str = "--calibration") -> None:
    """Raise `UserError` for a source that cannot be read, as far as that shows without reading it."""
    path = Path(os.path.expanduser(source))
    if source in (BUILTIN, BUILTIN_CODE) or path.exists():
        return
    if source.startswith(CORPUS):
        name = source.removeprefix(CORPUS)
        if name not in CORPORA:
            raise UserError(f"{flag}: unknown corpus '{name}'{nearest(name, CORPORA)}. Known: {', '.join(CORPORA)}")
    elif path.suffix in (".txt", ".md", ".jsonl", ".json") or source.startswith((".", "/", "~")):
        raise UserError(f"{flag}: {source} does not exist; give a text file, a folder, a dataset or 'builtin'")
    elif "/" not in source and (hint := nearest(source, (BUILTIN, BUILTIN_CODE), likeness=0.85)):
        raise UserError(f"{flag}: no text '{source}'{hint}; a dataset of that name is written owner/{source}")


def read_source(source: str, flag: str = "--calibration") -> Iterator[str]:
    """Pieces of text from one value of ``--calibration`` or another flag that takes text.

    Args:
        source: "builtin", "builtin-code", "corpus:NAME" for a built-in corpus of `emoe.assets.corpora`, a text file,
            a .jsonl file with a "text" field a line, a folder of text files, or a dataset ``name[:config[:split]]`` for
            the `datasets` library.

    Raises:
        UserError: nothing of that name, or text that is not UTF-8.
    """
    check_source(source, flag)
    path = Path(os.path.expanduser(source))
    if source == BUILTIN:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif source == BUILTIN_CODE:
        for file in sorted(Path(json.__file__).parents[1].glob("*.py")):
            yield from _read_file(file, flag)
    elif source.startswith(CORPUS):
        try:
            yield from read_corpus(source.removeprefix(CORPUS))
        except UserError as error:
            raise UserError(str(error).replace("--corpus", flag, 1)) from None
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise UserError(f"{flag}: folder {path} holds no file")
        for file in files:
            yield from _read_file(file, flag)
    elif path.is_file():
        yield from _read_file(path, flag)
    else:
        yield from _read_dataset(source, flag)


def _read_file(path: Path, flag: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    yield _jsonl_text(path, number, line, flag)
            else:
                while piece := file.read(PIECE):
                    yield piece
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _jsonl_text(path: Path, number: int, line: str, flag: str) -> str:
    try:
        text = str(json.loads(line)["text"]) + "\n"
        return text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, tokenizers take none
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{flag}: {path} line {number} is not a JSON object with a "text" field') from None


def _read_dataset(name: str, flag: str) -> Iterator[str]:
    import datasets

    repo, config, split = [*name.split(":"), None, None][:3]
    try:
        rows = datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
        column = "text" if "text" in columns else columns[0]
        for row in rows:
            yield str(row[column]) + "\n"
    except Exception as error:  # the library raises a dozen kinds; the user needs the one line
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: no file, folder or reachable dataset '{name}' ({type(error).__name__}: {first_line}); give "
            "a text file, a folder or 'builtin'"
        ) from None


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer itself puts before and behind a text."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _tokens(source: str, tokenizer: Any, flag: str) -> Iterator[int]:
    for text in read_source(source, flag):
        for start in range(0, len(text), PIECE):
            yield from tokenizer(text[start : start + PIECE], add_special_tokens=False, verbose=False).input_ids


def read_blocks(source: str, tokenizer: Any, length: int, wanted: int, flag: str = "--calibration") -> list[list[int]]:
    """The first `wanted` blocks of `length` tokens of a source, as `read_source` takes it; fewer if it is shorter."""
    before, behind = _special_tokens(tokenizer)
    inner = length - len(before) - len(behind)
    blocks, current = [], []
    for token in _tokens(source, tokenizer, flag):
        current.append(token)
        if len(current) == inner:
            blocks.append([*before, *current, *behind])
            current = []
            if len(blocks) == wanted:
                break
    return blocks


def load_blocks(
    sources: list[str],
    tokenizer: Any,
    *,
    length: int,
    calibration_tokens: int,
    held_out_tokens: int,
    seed: int,
    held_out: Sequence[str] = (),
    flag: str = "--calibration",
    domain: str = IN_DOMAIN,
) -> TokenBlocks:
    """Token blocks mixed equally from several sources.

    Args:
        length: tokens a block.
        calibration_tokens: wanted for calibration, over all sources; rounded up to whole blocks a source.
        held_out_tokens: wanted for measuring; these come from the end of what is read of each source, so that they are
            further from the calibration text than any two calibration blocks are. 0 for none.
        seed: draws the calibration blocks.
        held_out: further sources to measure on, each a domain of its own with as many tokens.
        flag: what errors call the sources.
        domain: what measurements on their end are called.

    Raises:
        UserError: a source is empty or too short, or one of `held_out` is among the sources.
    """
    for source in held_out:
        if held_out_tokens and any(_same_text(source, read) for read in sources):
            raise UserError(f"--held-out: {source} is among {flag}, whose end is held out already; name other text")
    share = lambda tokens: -(-tokens // (length * len(sources)))  # noqa: E731 - blocks a source, rounded up
    num_calibration, num_held_out = share(calibration_tokens), share(held_out_tokens)
    minimum = share(min(MINIMUM_TOKENS, calibration_tokens)) + (1 if held_out_tokens else 0)
    calibration, same = [], []
    for number, source in enumerate(sources):
        pool = read_blocks(source, tokenizer, length, POOL * (num_calibration + num_held_out), flag)
        if not pool:
            raise UserError(f"{flag}: {source} is empty or shorter than one block of {length} tokens")
        if len(pool) < minimum:
            raise UserError(
                f"{flag}: {source} has {len(pool) * length} tokens, at least {minimum * length} are needed; "
                f"give more text, a lower --sequence-length, or {flag} builtin"
            )
        tail = min(num_held_out, max(1, len(pool) // 5)) if held_out_tokens else 0
        same += pool[len(pool) - tail :]
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        drawn = torch.randperm(len(pool) - tail, generator=generator)[:num_calibration].sort().values
        calibration += [pool[i] for i in drawn.tolist()]
    domains = {domain: same}
    for source in held_out if held_out_tokens else ():
        domains[_domain_name(source, domains)] = held_out_blocks(source, tokenizer, length, held_out_tokens)
    digest = hashlib.sha256(json.dumps([calibration, *domains.values()]).encode()).hexdigest()
    as_tensor = lambda blocks: torch.tensor(blocks, dtype=torch.int64).reshape(-1, length)  # noqa: E731
    return TokenBlocks(as_tensor(calibration), {name: as_tensor(b) for name, b in domains.items()}, digest)


def held_out_blocks(source: str, tokenizer: Any, length: int, tokens: int) -> list[list[int]]:
    """Blocks of a source that is only measured on: the end of what is read of it.

    Raises:
        UserError: it has not one block.
    """
    wanted = -(-tokens // length)
    found = read_blocks(source, tokenizer, length, POOL * wanted, "--held-out")[-wanted:]
    if not found:
        raise UserError(f"--held-out: {source} is empty or shorter than one block of {length} tokens")
    return found


def _same_text(one: str, other: str) -> bool:
    """Whether two sources are one by name or, of files and folders, on the disk."""
    paths = Path(os.path.expanduser(one)), Path(os.path.expanduser(other))
    return one == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def _domain_name(source: str, taken: dict[str, list]) -> str:
    """A short name for a held-out source: the file's or dataset's own, with a number if it is taken."""
    name = Path(source).stem if Path(source).exists() else source
    return name if name not in taken else f"{name} {len(taken)}"
