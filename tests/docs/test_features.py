"""The feature tables: each row leads to a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/features.md")
LINK = re.compile(r"\[(test_\w+)\]\(([^)#]+\.py)\)")


def rows(page: str) -> list[str]:
    """Rows of tables with a heading "proved by", without headings of groups."""
    found, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        inside = line.startswith("|") and (inside or "proved by" in line)
        if inside and not re.fullmatch(r"\|.*proved by \||[|\-: ]+|\| \*\*[\w ]+\*\* \|[ |]*", line):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_feature_names_a_test_that_exists(page):
    assert len(rows(page)) >= 8
    for row in rows(page):
        links = LINK.findall(row)
        assert links, f"{page}: no test in {row}"
        for name, target in links:
            tree = ast.parse((ROOT / page).parent.joinpath(target).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, row


def test_a_missing_test_would_be_seen():
    assert LINK.findall("| a | [test_a](tests/a.py), [test_b](../b.py) |") == [
        ("test_a", "tests/a.py"),
        ("test_b", "../b.py"),
    ]
    assert LINK.findall("| a | [features](docs/features.md) |") == []
