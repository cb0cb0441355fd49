"""What `emoe compare` says of its figures, and how each format prints them."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.runs import DOMAINS, compared, truth, write_predictions, write_run

from emoe.cli.main import main
from emoe.report.comparison import (
    as_csv,
    as_json,
    as_latex,
    as_markdown,
    interval,
    latex_escape,
    mean_std,
    signed,
    statements,
)
from emoe.report.comparison_html import as_html
from emoe.report.panels import WIDTH, differences, seeds


def test_one_seed_is_compared_honestly(tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, effect=2.0 * arm, seeds=[0])
    found = compared(tmp_path / "arm0", tmp_path / "arm1")
    assert found.smallest_p == 1.0
    assert found.rows[1].scores["movies"].std is None
    assert not found.rows[1].differences["movies"].significant
    said = " ".join(statements(found))
    assert "nothing in this table can be significant" in said
    assert "Intervals (95%) and p examples are for new examples alone: one seed tells nothing of other seeds" in said
    assert "new seeds and new examples together" not in said


def test_one_domain_needs_no_holm(found, tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, domains={"movies": "id-test"})
    assert "Holm" not in " ".join(statements(compared(tmp_path / "arm0", tmp_path / "arm1")))
    assert "Holm adjusts p over the 3 domains" in " ".join(statements(found))


def test_the_same_answers_have_no_interval(tmp_path):
    """Models that say one class to everything; so do many before they have learned anything."""
    for arm in range(2):
        folder = write_run(tmp_path / f"arm{arm}", arm)
        for seed in range(5):
            labels, _ = truth("tweets", 200)
            path = folder / f"seed-{seed}" / "predictions" / "as-trained" / "tweets.jsonl"
            write_predictions(path, labels, np.full(200, arm))
    found = compared(tmp_path / "arm0", tmp_path / "arm1")
    text = as_markdown(found)
    assert "| arm1 | tweets | +0.00 | – |" in text
    assert "No interval (–): no draw of examples changes the difference" in text


def test_friedman_says_what_it_is_about(found):
    assert "not whether new seeds would" in next(line for line in statements(found) if "Friedman" in line)


@pytest.mark.parametrize(
    ("seeds", "domains", "said"),
    [
        (6, 3, "is 0.031, 0.094 after Holm over 3 domains: no single domain can be significant at 0.05"),
        (6, 3, "that takes 7 seeds."),
        (7, 3, "is 0.016, 0.047 after Holm over 3 domains."),
        (6, 1, "is 0.031."),  # the one p is its own
        (5, 3, "6 seeds are the least, 7 after Holm over 3 domains, 8 to 10"),
        (5, 1, "6 seeds are the least, 8 to 10"),
    ],
)
def test_the_floor_counts_the_domains(seeds, domains, said, tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, seeds=range(seeds), domains=dict(list(DOMAINS.items())[:domains]))
    assert said in " ".join(statements(compared(tmp_path / "arm0", tmp_path / "arm1")))


@pytest.mark.parametrize("seeds", [5, 6])
def test_too_few_seeds_are_named(tmp_path, seeds):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, effect=2.0 * arm, seeds=range(seeds))
    text = " ".join(statements(compared(tmp_path / "arm0", tmp_path / "arm1")))
    assert ("nothing in this table can be significant" in text) == (seeds < 6)
    assert {5: "0.062", 6: "0.031"}[seeds] in text


def test_csv_carries_every_figure(found):
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert len(rows) == len(found.rows) * len(found.columns)
    kept = {(row["run"], row["domain"]): row for row in rows}
    for row in json.loads(as_json(found))["rows"]:
        for domain, scores in row["scores"].items():
            line = kept[row["name"], domain]
            assert [float(line[f"seed_{seed}"]) for seed in found.seeds] == scores["by_seed"]
            assert float(line["mean"]) == scores["mean"]
            for key, value in (row["differences"].get(domain) or {}).items():
                assert (float(line[key]) if line[key] else None) == value
            assert float(line["seconds"]) == row["cost"]["seconds"]


class Page(HTMLParser):
    """Tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_html_escapes_names_and_fetches_nothing(tmp_path):
    evil = '<script>alert("1")<&$x$_'
    write_run(tmp_path / "vanilla", 0)
    write_run(tmp_path / evil, 1, domains=DOMAINS)
    text = as_html(compared(tmp_path / "vanilla", tmp_path / evil))
    page = Page(text)
    assert "script" not in page.tags
    assert evil in page.text
    assert page.tags.count("svg") == 2 * len(DOMAINS) + 2  # differences and seeds of each and of the OOD mean
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href") and value[0] != "#"]
    assert links == []
    assert "url(http" not in text


def test_drawings_say_what_they_show(found):
    told = [value for key, value in Page(as_html(found)).attributes if key == "aria-label"]
    better, equal = (row.differences["amazon"] for row in found.rows[1:])
    shown = [f"{name} {signed(d.difference)} {interval(d)}" for name, d in (("better", better), ("equal", equal))]
    assert f"amazon: points over vanilla with 95% intervals. {'; '.join(shown)}." in told
    means = "; ".join(f"{row.name} {mean_std(row.scores['amazon'])}" for row in found.rows)
    assert f"amazon: points of every seed. Mean: {means}." in told


def test_drawings_hold_what_is_there(found):
    """A dot a run, filled where it is significant; of single seeds one each; all of it within the panel."""
    for column in found.columns:
        of_runs, of_seeds = differences(found, column), seeds(found, column)
        assert of_runs.count("<circle") == 2
        assert of_runs.count(" open") == sum(not row.differences[column].significant for row in found.rows[1:])
        assert of_seeds.count("<circle") == len(found.rows) * len(found.seeds)
        places = [float(x) for text in (of_runs, of_seeds) for x in re.findall(r'(?:cx|x1|x2)="([\d.-]+)"', text)]
        assert min(places) > 0
        assert max(places) < WIDTH


def test_long_names_keep_both_ends(tmp_path):
    for arm, name in enumerate(("vanilla", "emoe-at-a-rate-of-3e-5", "emoe-at-a-rate-of-5e-5")):
        write_run(tmp_path / name, arm)
    found = compared(*sorted(tmp_path.iterdir(), reverse=True))
    text = differences(found, "amazon")
    assert ">emoe-at-…-of-3e-5</text>" in text
    assert ">emoe-at-…-of-5e-5</text>" in text


def test_html_is_the_same_each_time(found):
    assert as_html(found) == as_html(found)


def test_latex_is_balanced_and_escaped(found):
    text = as_latex(found)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 3
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") == text.split(r"\begin{tabular}{")[1].split("}")[0].count("r") for line in body[:4])
    assert latex_escape(r"a_b&50%\{x}") == r"a\_b\&50\%\textbackslash{}\{x\}"
    assert not set("±−–") & set(text)


def test_markdown_escapes_names(tmp_path):
    write_run(tmp_path / "vanilla", 0)
    write_run(tmp_path / "a|b*", 1)
    text = as_markdown(compared(tmp_path / "vanilla", tmp_path / "a|b*"))
    assert r"| a\|b\* |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_the_command(runs, tmp_path, capsys):
    folders = [str(runs / "vanilla"), str(runs / "better")]
    assert main(["compare", *folders, "--resamples", "200", "--per-seed"]) == 0
    shown = capsys.readouterr().out
    assert "OOD mean" in shown
    assert "8 seeds in pairs" in shown
    assert "every seed" in shown
    for suffix in ("md", "csv", "json", "html", "tex"):
        target = tmp_path / f"table.{suffix}"
        assert main(["compare", *folders, "--resamples", "200", "--output", str(target), "--quiet"]) == 0
        assert target.read_text()
    capsys.readouterr()
    assert main(["compare", *folders, "--resamples", "200", "--format", "csv", "--quiet"]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.csv").read_text()
