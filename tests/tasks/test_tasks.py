"""Tasks: splits that stay, nothing of a test set in training, labels that mean the same in every domain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics
from support.labelled import sentences, write_csv, write_task

from emoe import tasks
from emoe.errors import UserError
from emoe.tasks.data import key_of, load_task, place_of
from emoe.tasks.metrics import FITTING, METRICS, compute
from emoe.tasks.sources import Columns, read_table
from emoe.tasks.spam import mail_text
from emoe.tasks.spec import Domain, Example, NotThere, Task, Where


class Given:
    """A source of examples made here."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def read(self, where: Where):
        return iter(self.examples)


def pool(count: int) -> list[Example]:
    return [Example(str(i), f"text number {i}", None, i % 2) for i in range(count)]


def task_of(own: list[Example], far: list[Example]) -> Task:
    domains = (Domain("own", "id", {"all": Given(own)}), Domain("far", "ood", {"test": Given(far)}))
    return Task("made", "", ("a", "b"), ("accuracy",), domains)


def ids(examples: list[Example]) -> set[str]:
    return {example.id for example in examples}


def test_splits_depend_on_the_text_alone():
    whole = load_task(task_of(pool(2000), pool(1)[:1]))
    parts = [ids(whole.train), ids(whole.validation.examples), ids(whole.tests["own"].examples)]
    assert sum(map(len, parts)) >= 1999
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [round(len(part) / 2000, 1) for part in parts] == [0.8, 0.1, 0.1]
    half = load_task(task_of(pool(2000)[::-1][:1000], pool(1)[:1]))  # other order, fewer texts
    assert ids(half.tests["own"].examples) <= parts[2]
    assert ids(half.validation.examples) <= parts[1]
    assert place_of("a") == load_place_of_a()


def load_place_of_a() -> float:
    """sha256 of "a" begins with ca978112ca1bbdca, on every machine and in every year."""
    return 0xCA978112CA1BBDCA / 2**64


def test_copies_of_test_texts_leave_training_and_are_counted():
    far = [Example("x", "TEXT, number 7!", None, 0), Example("y", "something else", None, 1)]
    own = pool(400)
    without = load_task(task_of(own, [far[1]]))
    found = load_task(task_of(own, far))
    in_train = "7" in ids(without.train)
    assert found.duplicates_removed == {"own-validation": 0, "own": 0, "far": int(in_train)}
    assert in_train
    assert ids(without.train) - ids(found.train) == {"7"}
    assert found.tests["far"].examples == far  # a test set is never thinned out


def test_a_validation_set_drawn_from_training_texts_knows_no_test_text_of_the_makers():
    train, test = pool(500), [Example(f"test {e.id}", e.text.upper(), None, e.label) for e in pool(60)]
    domains = (Domain("own", "id", {"train": Given(train), "test": Given(test)}),)
    found = load_task(Task("made", "", ("a", "b"), ("accuracy",), domains))
    texts = {key_of(example) for example in test}
    drawn = [example for example in train if place_of(key_of(example)) < 0.1]
    assert any(key_of(example) in texts for example in drawn)
    assert ids(found.validation.examples) == {example.id for example in drawn if key_of(example) not in texts}
    assert found.tests["own"].examples == test


@pytest.mark.parametrize("wanted", [None, [], ["far"]])
def test_training_knows_no_test_text_whatever_is_scored(wanted):
    """Nor does what selects: drawn from the training texts or a file of its own."""
    own = pool(400)
    far = [Example(f"far {e.id}", e.text.upper(), None, e.label) for e in own[:200]]
    made = {"train": own[:300], "validation": [*own[180:210], *own[290:300]], "test": own[290:]}
    for parts in ({"all": own}, made):
        sources = {part: Given(examples) for part, examples in parts.items()}
        domains = (Domain("own", "id", sources), Domain("far", "ood", {"test": Given(far)}))
        found = load_task(Task("made", "", ("a", "b"), ("accuracy",), domains), domains=wanted)
        assert list(found.tests) == ["own-validation", "own", *(["far"] if wanted != [] else [])]
        reported = ids(found.tests["own"].examples) | ids(own[:200])
        selects = ids(found.validation.examples)
        assert found.train
        assert selects
        assert not ids(found.train) & (reported | selects)
        assert not selects & reported
        assert found.duplicates_removed["far"] > 0
        assert len(found.notes) == 1
        assert found.notes[0].startswith("validation texts left out because they stand in a test set, too: ")


def test_sets_that_are_not_to_be_had_are_named_though_nobody_scores_them():
    class Gone(Given):
        def read(self, where):
            raise self.examples

    domains = [Domain("own", "id", {"all": Given(pool(400))})]
    domains += [Domain(name, "ood", {"test": Gone(error("no"))}) for name, error in (("a", NotThere), ("b", UserError))]
    task = Task("made", "", ("a", "b"), ("accuracy",), tuple(domains))
    lost = "cannot be read, its texts may stand in training: no"
    assert load_task(task, domains=[]).notes == [f"domain a {lost}", f"domain b {lost}"]
    assert load_task(task, domains=["a"]).notes == ["domain a is left out: no", f"domain b {lost}"]
    with pytest.raises(UserError, match="no"):
        load_task(task, domains=["b"])


def test_an_earlier_training_set_is_made_again():
    """Of a run that one of the sets was not there for."""
    own = pool(400)
    task = task_of(own, own[:200])
    without = load_task(task_of(own, [Example("z", "z", None, 0)]))
    again = load_task(task, cleaned_of=["own", "own-validation"])
    assert again.train == without.train != load_task(task).train
    assert list(again.tests) == ["own-validation", "own", "far"]


def test_an_instruction_stands_in_one_part_whatever_its_answers(tmp_path):
    rows = [{"instruction": f"say {i}", "output": f"{i} {j}"} for i in range(200) for j in range(3)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    found = load_task(tasks.get(str(tmp_path / "alpaca.json")))
    parts = [{e.text for e in p} for p in (found.train, *(test.examples for test in found.tests.values()))]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    assert min(map(len, parts)) > 0


def test_copies_within_the_domain_fall_into_one_part():
    copies = [Example(f"copy {e.id}", e.text.upper() + " !", None, e.label) for e in pool(500)]
    found = load_task(task_of([*pool(500), *copies], [Example("z", "z", None, 0)]))
    assert found.duplicates_removed["own"] == found.duplicates_removed["own-validation"] == 0
    for part in (found.train, found.validation.examples, found.tests["own"].examples):
        kept = ids(part)
        assert all((f"copy {i}" in kept) == (i in kept) for i in map(str, range(500)))


def test_limits_take_the_same_texts_again():
    far = [Example("z", "z", None, 0)]
    few, more = (load_task(task_of(pool(1000), far), train_limit=n, test_limit=n // 4) for n in (40, 80))
    assert (len(few.train), len(few.tests["own"].examples)) == (40, 10)
    assert ids(few.train) <= ids(more.train)
    assert ids(few.tests["own"].examples) <= ids(more.tests["own"].examples)


def test_keys_ignore_case_and_marks_but_not_words():
    same = [Example("", text, None, 0) for text in ("It's  Good!", "it s good", "IT'S GOOD...")]
    assert len({key_of(e) for e in same}) == 1
    assert key_of(Example("", "good", "bad", 0)) != key_of(Example("", "good", None, 0))
    assert key_of(Example("", ":-)", None, 0)) != key_of(Example("", ":-(", None, 0))


def test_a_file_of_one_s_own(tmp_path):
    path = write_task(tmp_path)
    text = path.read_text().replace("file: far.csv", "file: far.jsonl, classes: {good: 'yes', bad: 'no', so-so: null}")
    path.write_text(text)
    far = [{"text": t, "label": "good" if y == "yes" else "bad"} for t, y in sentences(10, 6)]
    far.append({"text": "neither", "label": "so-so"})
    (tmp_path / "far.jsonl").write_text("".join(json.dumps(row) + "\n" for row in far))
    found = load_task(tasks.get(str(path)))
    assert [e.label for e in found.tests["far"].examples] == [0, 1] * 5
    assert found.task.metrics == ("balanced_accuracy", "accuracy")
    with pytest.raises(UserError, match=r"has no domain 'fra' .did you mean 'far'"):
        load_task(found.task, domains=["fra"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"labels: ['no', 'yes']": "metric: f1"},
            "'f1' does not fit numbers, and no labels are named; take pearson",
        ),
        ({"domains:": "metric: pearson\ndomains:"}, "metric 'pearson' does not fit classes; take balanced_accuracy"),
        ({"domains:": "metric: token_accuracy\ndomains:"}, "metric 'token_accuracy' does not fit classes"),
        ({"['no', 'yes']": "['no', 'yes', 'no']"}, "label 'no' is named twice"),
        ({"far:": "own-validation:"}, "'own-validation' is the name of the validation set"),
        ({"['no', 'yes']": "[no, yes]"}, "labels.0: yes, no, on, off, true and false are booleans in YAML; put quotes"),
        ({"far.csv": "far.csv, classes: {no: 'no', yes: 'yes'}"}, "booleans in YAML; put quotes"),
        ({"far.csv": "far.csv, classes: {'no': no, 'yes': 'yes'}"}, "booleans in YAML; put quotes"),
    ],
)
def test_a_task_file_that_cannot_be_meant(changes, complaint, tmp_path):
    path = write_task(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        tasks.get(str(path))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", ["far.csv", "far.jsonl", "far.json"])
def test_tables_may_begin_with_a_byte_order_mark(name, tmp_path):
    path = write_task(tmp_path, **{"far.csv": name})
    row = '{"text": "fine", "label": "yes"}'
    text = {"csv": "text,label\nfine,yes\n", "jsonl": row, "json": f"[{row}]"}[name.partition(".")[2]]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [e.text for e in load_task(tasks.get(str(path))).tests["far"].examples] == ["fine"]


def test_a_missing_text_is_no_text(tmp_path):
    path = write_task(tmp_path, **{"far.csv": "far.jsonl"})
    rows = [{"text": "fine", "label": "yes"}, {"text": None, "label": "no"}, {"text": "poor", "label": "no"}]
    (tmp_path / "far.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.text for e in load_task(tasks.get(str(path))).tests["far"].examples] == ["fine", "poor"]


def test_scitail_has_words_of_its_own():
    scitail = next(domain for domain in tasks.get("rte").domains if domain.name == "scitail").sources["test"]
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in ("entails", "neutral")]
    assert [e.label for e in scitail.columns.examples(iter(rows), "scitail")] == [0, 1]


@pytest.mark.parametrize("column", ["", ", id: text"])
def test_an_id_stands_for_one_example(column, tmp_path):
    """Found before a run whose predictions could not be paired with another's."""
    path = write_task(tmp_path, **{"far.csv": f"far.csv{column}"})
    with open(tmp_path / "far.csv", "a") as file:
        file.write("once more,yes\nonce more,yes\n")
    if column:
        with pytest.raises(UserError, match=r"the far set of task 'neurons' has the id 'once more' 2 times"):
            load_task(tasks.get(str(path)))
    else:
        assert len(load_task(tasks.get(str(path))).tests["far"].examples) == 29


@pytest.mark.parametrize("label", ["nan", "inf", ""])
def test_a_score_is_a_number(label, tmp_path):
    path = write_task(tmp_path, **{"labels: ['no', 'yes']\n": ""})
    for part in ("train", "validation", "test", "far"):
        (tmp_path / f"{part}.csv").write_text("text,label\n" + "".join(f"{part} {n},{n}\n" for n in range(9)))
    assert load_task(tasks.get(str(path))).train[3].label == 3.0
    (tmp_path / "train.csv").write_text(f"text,label\nfirst,1\nsecond,{label}\n")
    with pytest.raises(UserError, match=f"row 2: label '{label}' does not belong"):
        load_task(tasks.get(str(path)))


def test_a_table_that_is_no_parquet(tmp_path):
    path = write_task(tmp_path, **{"far.csv": "far.parquet"})
    (tmp_path / "far.parquet").write_text("text,label\n")
    with pytest.raises(UserError, match=r"far\.parquet is not a parquet file"):
        load_task(tasks.get(str(path)))


def test_glue_from_a_folder_leaves_out_what_is_not_there(tmp_path):
    for split, count in (("train", 60), ("validation", 20)):
        rows = [(text, str(int(label == "yes"))) for text, label in sentences(count, len(split))]
        (tmp_path / "sst2").mkdir(exist_ok=True)
        write_csv(tmp_path / "sst2" / f"{split}.csv", rows)
        file = tmp_path / "sst2" / f"{split}.csv"
        file.write_text(file.read_text().replace("text,label", "sentence,label"))
    (tmp_path / "imdb").mkdir()
    write_csv(tmp_path / "imdb" / "test.csv", [("a fine film", "1"), ("a poor film", "0"), ("unlabelled", "-1")])
    found = load_task(tasks.get("sst2"), where=Where(tmp_path))
    assert {name: (t.role, len(t.examples)) for name, t in found.tests.items()} | {"sst2-validation": 0} == {
        "sst2-validation": 0,
        "sst2": ("id-test", 20),
        "imdb": ("ood", 2),
    }
    assert len(found.train) + len(found.validation.examples) >= 59
    assert [note.split(" is left out")[0] for note in found.notes] == [
        f"domain {n}" for n in ("yelp", "amazon", "flipkart")
    ]
    with pytest.raises(UserError, match=r"the domain to train on, cola: .* has no train file"):
        load_task(tasks.get("cola"), where=Where(tmp_path))


def test_every_metric_fits_some_kind():
    assert {name for names in FITTING.values() for name in names} == set(METRICS)


def test_every_task_names_its_parts():
    for name, task in tasks.TASKS.items():
        assert task.name == name
        assert task.in_domain.role == "id"
        assert all(set(d.sources) == {"test"} for d in task.domains if d.role == "ood")
        assert len({d.name for d in task.domains}) == len(task.domains)
        assert set(task.metrics) <= set(FITTING[task.kind])
        assert bool(task.labels) == (task.kind == "classification")


def test_mails_lose_their_headers_and_pages_their_marks():
    mail = "From: someone@where\nReceived: by relay\nSubject: Win\nContent-Type: text/html\n\n"
    mail += "<html><style>p {}</style><p>a <b>prize</b>\n now</p></html>"
    assert mail_text(json.dumps({"text": mail})) == "Win a prize now"


@pytest.mark.parametrize("plain", ["", " \n\n", None, "Buy"])
def test_a_mail_with_an_empty_text_is_its_page(plain):
    parts = [] if plain is None else [f"Content-Type: text/plain\n\n{plain}\n"]
    parts.append("Content-Type: text/html\n\n<p>a <b>prize</b></p>\n")
    mail = 'Subject: Win\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary="x"\n\n'
    mail += "".join(f"--x\n{part}" for part in parts) + "--x--\n"
    assert mail_text(json.dumps({"text": mail})) == ("Win Buy" if plain == "Buy" else "Win a prize")


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    """U+2028, U+2029 and U+0085 may stand in a string as they are (RFC 8259, sec. 7)."""
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\r\n\n{"text": "four"}\n', encoding="utf-8", newline="")
    assert [row["text"] for row in read_table(path)] == ["one\u2028two\u0085three", "four"]
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(UserError, match="line 2, is not valid JSON"):
        list(read_table(path))


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("text,label\nfine,1\nalone\n", "row 2: no value for 'label', it has 1 of 2 columns"),
        ("text;label\na;1\n", "has the one column 'text;label'; separate columns by commas"),
        ("txt,label\na,1\n", "has no column 'text' (did you mean 'txt'?); it has txt, label"),
    ],
)
def test_tables_that_lack_a_column(table, complaint, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(table)
    with pytest.raises(UserError) as caught:
        list(Columns("text", "label").examples(read_table(path), path.name))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_sklearn_s(seed):
    draw = np.random.default_rng(seed)
    labels, predictions = draw.integers(0, 2 + seed, 200), draw.integers(0, 2 + seed, 200)
    found = compute(["accuracy", "balanced_accuracy", "matthews"], labels, predictions)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    assert found["balanced_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predictions))
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predictions))


def test_metrics_at_their_ends():
    labels = [0, 1, 1, 0]
    assert set(
        compute(["accuracy", "balanced_accuracy", "f1", "matthews", "accuracy_f1"], labels, labels).values()
    ) == {1.0}
    assert compute(["matthews", "f1", "pearson", "spearman"], labels, [0] * 4) == {
        "matthews": 0.0,
        "f1": 0.0,
        "pearson": 0.0,
        "spearman": 0.0,
    }
    assert compute(["pearson_spearman"], [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson_spearman"] == pytest.approx(1)
    # a class that does not occur counts neither way
    assert compute(["balanced_accuracy"], [0, 0, 1, 1], [0, 2, 1, 1])["balanced_accuracy"] == 0.75


@pytest.mark.model
def test_packaged_families_have_the_published_counts():
    counts = {"amazon": 2985, "nyt": 2970, "tweets": 3432, "airline": 23140, "sms": 4837}
    for name in ("sentiment", "spam"):
        found = load_task(tasks.get(name))
        own = found.task.in_domain.name
        total = len(found.train) + sum(found.duplicates_removed.values())
        total += sum(len(found.tests[n].examples) for n in (own, f"{own}-validation"))
        assert total >= {"sentiment": 10072, "spam": 6046}[name]
        for domain, test in found.tests.items():
            assert len(test.examples) == counts.get(domain, len(test.examples))
            assert len(ids(test.examples)) == len(test.examples)


def test_names_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        tasks.get(str(tmp_path / "no.yaml"))
    with pytest.raises(UserError, match=r"unknown task 'sst3' .did you mean 'sst2'"):
        tasks.get("sst3")
