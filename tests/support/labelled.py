"""A labelled task that a tiny model can learn: does the text speak of neurons?"""

from __future__ import annotations

import csv
import random
from pathlib import Path

from support.tiny import TEXT

WORD = "neurons"


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, "yes" or "no"), balanced, no text twice."""
    words = sorted({word.strip(".").lower() for word in TEXT.split()} - {WORD})
    draw, found = random.Random(seed), {}
    while len(found) < count:
        text = draw.choices(words, k=draw.randint(4, 9))
        if len(found) % 2:
            text[draw.randrange(len(text))] = WORD
        found[" ".join(text)] = "yes" if WORD in text else "no"
    return list(found.items())


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A table with the columns text and label."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def write_task(folder: Path, train: int = 96, **changes: str) -> Path:
    """A task file with an ID domain "own" and an OOD domain "far", which repeats three training texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sentences(train, 1)
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "validation.csv", sentences(40, 2))
    write_csv(folder / "test.csv", sentences(24, 3))
    write_csv(folder / "far.csv", [*sentences(24, 4), *rows[:3]])
    text = (
        "name: neurons\nlabels: ['no', 'yes']\ndomains:\n"
        "  own: {role: id, train: train.csv, validation: validation.csv, test: test.csv}\n"
        "  far: {role: ood, file: far.csv}\n"
    )
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "task.yaml"
    path.write_text(text)
    return path


def write_glue(folder: Path) -> Path:
    """FOLDER/sst2/train.csv and validation.csv, as `--data-dir` wants them; returns the folder."""
    (folder / "sst2").mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 12)):
        rows = [(text, str(int(label == "yes"))) for text, label in sentences(count, count)]
        file = write_csv(folder / "sst2" / f"{name}.csv", rows)
        file.write_text(file.read_text().replace("text,label", "sentence,label"))
    return folder
