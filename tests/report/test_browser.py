"""The HTML pages in a real browser: no word on its console, none wider than a telephone. Skipped without Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


PHONE = 390
"""Pixels; a window of Chromium's own is never narrower than 500."""
FRAME = """<!doctype html><iframe width="{width}" height="800" style="border: 0" src="{page}"></iframe><p>
<script>
document.querySelector("iframe").onload = ({{ target }}) => {{
  const {{ scrollWidth, clientWidth }} = target.contentDocument.documentElement;
  document.querySelector("p").textContent = `wide: ${{scrollWidth}} of ${{clientWidth}}`;
}};
</script>"""


def opened(page: Path, place: Path, *more: str) -> tuple[str, list[str]]:
    """The page's document as the browser made it, and what the browser wrote to its console."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={place}",
        *more,
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, re.findall(r":CONSOLE[:(].*", done.stderr)


def widths(page: Path, place: Path) -> tuple[int, int]:
    """How wide a page is on a telephone, and how wide its window."""
    frame = place / "frame.html"
    frame.write_text(FRAME.format(width=PHONE, page=page.as_uri()))
    document, _ = opened(frame, place / "profile", "--allow-file-access-from-files", "--hide-scrollbars")
    found = re.search(r"wide: (\d+) of (\d+)", document)
    assert found, "the frame was read"
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("name", ["report", "compare", "analyze"])
def test_a_page_opens_without_complaint(name, pages, tmp_path):
    document, said = opened(pages[name], tmp_path)
    assert said == []
    assert "</table>" in document


def test_a_complaint_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    page.write_text(f"<!doctype html>{policy}<img src='data:image/png;base64,AAAA'><p>text")
    _, said = opened(page, tmp_path / "profile")
    assert "Content Security Policy" in said[0]


@pytest.mark.parametrize("name", ["report", "compare", "analyze"])
def test_a_page_fits_a_telephone(name, pages, tmp_path):
    page, window = widths(pages[name], tmp_path)
    assert page <= window == PHONE


def test_what_is_too_wide_would_be_seen(pages, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(pages["compare"].read_text().replace("<footer>", '<div style="width: 400px">wide</div><footer>'))
    assert widths(page, tmp_path) == (pytest.approx(400, abs=30), PHONE)
