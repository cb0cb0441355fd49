"""The HTML pages in a real browser: they open without a word on its console. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.runs import write_run

from emoe.cli.main import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def opened(page: Path, place: Path) -> tuple[str, list[str]]:
    """The page's document as the browser made it, and what the browser wrote to its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={place}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, re.findall(r":CONSOLE[:(].*", done.stderr)


@pytest.fixture(scope="module")
def pages(converted_llama, text_file, tmp_path_factory) -> dict[str, Path]:
    """Each kind of page that a command writes."""
    place = tmp_path_factory.mktemp("pages")
    runs = [str(write_run(place / arm, seeds=range(3), examples=40)) for arm in ("vanilla", "emoe")]
    text = ["--text", str(text_file), "--text", "builtin", "--tokens", "64"]
    report, comparison, usage = place / "report.html", place / "comparison.html", place / "usage"
    assert main(["report", str(converted_llama), "--html", str(report), *text, "--quiet"]) == 0
    assert main(["compare", *runs, "--resamples", "100", "--output", str(comparison), "--quiet"]) == 0
    domains = ["--domains", f"a={text_file}", f"b={text_file}", "--tokens", "256", "--sequence-length", "64"]
    assert main(["analyze", "--model", str(converted_llama), *domains, "--output", str(usage), "--quiet"]) == 0
    return {"report": report, "compare": comparison, "analyze": usage / "index.html"}


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
