"""Files of several formats to plain text."""

from __future__ import annotations

import gzip
import html as html_entities
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

_ROFF_TEXT_MACROS = frozenset(["SH", "SS", "B", "I", "BR", "BI", "RB", "IR", "IB", "RI", "SM", "SB"])
"""Macros of man(7) whose arguments are text."""

_ROFF_CHARACTERS = {r"\-": "-", r"\&": "", r"\ ": " ", r"\e": "\\", r"\(aq": "'", r"\(bu": "*", r"\|": "", r"\^": ""}

_R_BYTES = 9
"""Type number of a string in R's serialisation (CHARSXP)."""


def plain(path: Path) -> str:
    """Text as it is, unpacked if it is gzipped; bytes that are no UTF-8 are dropped."""
    opened = gzip.open if path.suffix in (".gz", ".dz") else open
    with opened(path, "rb") as file:
        return file.read().decode("utf-8", errors="ignore")


class _Text(HTMLParser):
    """Text between tags; blocks end with a line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style", "title")
        if tag in ("p", "h1", "h2", "h3", "li", "br", "div", "blockquote"):
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style", "title")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def html(path: Path) -> str:
    """The text of a page, a block a line."""
    parser = _Text()
    parser.feed(plain(path))
    lines = (line.strip() for line in html_entities.unescape("".join(parser.parts)).split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


def roff(path: Path) -> str:
    """A manual page without its macros."""
    lines = []
    for line in plain(path).splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].partition(" ")
            if macro not in _ROFF_TEXT_MACROS:
                continue
            line = rest.replace('"', "")
        line = re.sub(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\\*\(..|\\\".*", "", line)
        for code, character in _ROFF_CHARACTERS.items():
            line = line.replace(code, character)
        lines.append(line)
    return "\n".join(lines) + "\n"


def glosses(path: Path) -> str:
    """WordNet's data files: ``offset … | gloss`` to ``word, word: gloss``, without the licence at the head."""
    lines = []
    for line in plain(path).splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words = (word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
        lines.append(f"{', '.join(words)}: {gloss.strip()}")
    return "\n".join(lines) + "\n"


def tagged_words(path: Path) -> str:
    """``The/at jury/nn`` to ``The jury``, with punctuation where it belongs."""
    lines = []
    for line in plain(path).splitlines():
        text = " ".join(token.rsplit("/", 1)[0] for token in line.split())
        text = re.sub(r" ([.,;:?!)]+)(?= |$)", r"\1", text.replace("`` ", '"').replace(" ''", '"'))
        if text:
            lines.append(text)
    return "\n".join(lines) + "\n"


def r_data(path: Path) -> str:
    """The strings in a lazy-load database of R: zlib blocks of big-endian serialised vectors, a string a line."""
    data, lines = path.read_bytes(), []
    while len(data) > 4:
        block = zlib.decompressobj()
        values = block.decompress(data[4:])  # four bytes tell the length
        data = block.unused_data
        lines += _r_strings(values)
    return "\n".join(lines) + "\n"


def _r_strings(values: bytes) -> list[str]:
    """Strings of a serialised character vector: its header, then a flag word, a length and the bytes of each."""
    at = values.find(b"\x00\x00\x00\x10")  # STRSXP, no attributes
    if at < 0:
        return []
    (count,) = struct.unpack_from(">i", values, at + 4)
    at, strings = at + 8, []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", values, at)
        if flags & 0xFF != _R_BYTES:
            break
        at += 8
        strings.append(values[at : at + max(0, length)].decode("utf-8", errors="ignore"))
        at += max(0, length)
    return strings
