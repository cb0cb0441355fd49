"""Every kind of HTML page, as its command writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import write_run

from emoe.cli.main import main


@pytest.fixture(scope="package")
def pages(converted_llama, text_file, tmp_path_factory) -> dict[str, Path]:
    """By the command's name."""
    place = tmp_path_factory.mktemp("pages")
    arms = ("vanilla", "emoe", "emoe-of-a-name-that-is-longer-than-a-telephone-is-wide")
    runs = [str(write_run(place / arm, seeds=range(3), examples=40)) for arm in arms]
    text = ["--text", str(text_file), "--text", "builtin", "--tokens", "64"]
    report, comparison, usage = place / "report.html", place / "comparison.html", place / "usage"
    assert main(["report", str(converted_llama), *runs, "--html", str(report), *text, "--quiet"]) == 0
    assert main(["compare", *runs, "--resamples", "100", "--output", str(comparison), "--quiet"]) == 0
    domains = ["--domains", f"a={text_file}", f"b={text_file}", "--tokens", "256", "--sequence-length", "64"]
    assert main(["analyze", "--model", str(converted_llama), *domains, "--output", str(usage), "--quiet"]) == 0
    return {"report": report, "compare": comparison, "analyze": usage / "index.html"}
