"""What all HTML pages have in common: one head, and parts that can be read without a mouse or without eyes."""

from __future__ import annotations

import re

import pytest

EVERY = pytest.mark.parametrize("name", ["report", "compare", "analyze"])


@EVERY
def test_the_head_is_common(name, pages):
    text = pages[name].read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert '<meta name="color-scheme" content="light dark">' in text
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert text.count("<h1>") == 1
    assert "This page fetches nothing." in text


@EVERY
def test_what_scrolls_takes_the_keyboard(name, pages):
    """Every table lies in a box with a name that can be focused."""
    text = pages[name].read_text(encoding="utf-8")
    boxes = re.findall(r'<div class="wide" tabindex="0" role="region" aria-label="([^"]+)">\s*<(table|img)', text)
    assert [kind for _, kind in boxes].count("table") == text.count("<table")
    assert text.count("<table") > 2
    assert text.count('class="wide"') == len(boxes)


@EVERY
def test_pictures_are_told(name, pages):
    text = pages[name].read_text(encoding="utf-8")
    for tag in re.findall(r"<img[^>]*>", text):
        assert re.search(r'alt="[^"]+"', tag)
    for tag in re.findall(r"<svg[^>]*>", text):
        assert re.search(r'role="img" aria-label="[^"]+\d[^"]*"', tag)


@EVERY
def test_colours_are_the_schemes(name, pages):
    """A colour outside of the two palettes would be the same in light and dark."""
    drawings = re.findall(r"<svg.*?</svg>", pages[name].read_text(encoding="utf-8"), re.DOTALL)
    assert not re.search(r'(fill|stroke|style)="', "".join(drawings))
