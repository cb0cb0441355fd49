"""GLUE (Wang et al. 2019, arXiv 1804.07461) with the out-of-domain partners of GLUE-X (Yang et al. 2023, 2211.08073).

GLUE's test labels are not public. Its dev set is therefore the ID test here, and a tenth of the training set, split off
by hash, selects; the published comparison selects on the dev set that it reports. Sets that only GLUE-X's own release
has are read from ``--data-dir``.
"""

from __future__ import annotations

from collections.abc import Mapping

from emoe.tasks.sources import Columns, Hub
from emoe.tasks.spec import Domain, Source, Task

_GLUE = "nyu-mll/glue"
_NLI = {"0": 0, "1": 1, "2": 2, "-1": -1, "entailment": 0, "neutral": 1, "contradiction": 2, "ENTAILMENT": 0}
_NLI |= {"NEUTRAL": 1, "CONTRADICTION": 2}
_TWO_WAY = {"0": 0, "1": 1, "-1": -1, "entailment": 0, "not_entailment": 1, "non-entailment": 1, "neutral": 1}
_TWO_WAY |= {"entails": 0}  # SciTail
_BINARY = {"0": 0, "1": 1, "-1": -1}


def _glue(config: str, split: str, columns: Columns) -> Hub:
    return Hub(config, split, columns, _GLUE, config)


def _own(config: str, columns: Columns, test: str = "validation") -> Domain:
    return Domain(config, "id", {"train": _glue(config, "train", columns), "test": _glue(config, test, columns)})


def _ood(name: str, source: Source) -> Domain:
    return Domain(name, "ood", {"test": source})


def _pairs(one: str, two: str, classes: Mapping[str, int] = _BINARY, label: str = "label") -> Columns:
    return Columns(one, label, pair=two, classes=classes)


_SENTENCE = Columns("sentence", "label", classes=_BINARY)
_TEXT = Columns("text", "label", classes=_BINARY)
_SENTENCES = _pairs("sentence1", "sentence2")
_QUESTIONS = _pairs("question1", "question2")
_RTE = _pairs("sentence1", "sentence2", _TWO_WAY)
_PREMISE = _pairs("premise", "hypothesis", _NLI)
_SCORED = Columns("sentence1", "label", pair="sentence2", classes=float)
_SICK = _pairs("sentence_A", "sentence_B", _NLI)
_SICK_SCORE = Columns("sentence_A", "relatedness_score", pair="sentence_B", classes=float)

_TWITTER = _ood("twitter", Hub("twitter", "test", _SENTENCES))
_ENTAILMENT, _PARAPHRASE = ("entailment", "not_entailment"), ("different", "same")

TASKS = (
    Task(
        "sst2",
        "sentiment of film reviews → imdb, yelp, amazon, flipkart",
        ("negative", "positive"),
        ("accuracy", "balanced_accuracy"),
        (
            _own("sst2", _SENTENCE),
            _ood("imdb", Hub("imdb", "test", _TEXT, "stanfordnlp/imdb")),
            _ood("yelp", Hub("yelp", "test", _TEXT, "fancyzhx/yelp_polarity")),
            _ood(
                "amazon",
                Hub("amazon", "test", Columns("content", "label", classes=_BINARY), "fancyzhx/amazon_polarity"),
            ),
            _ood("flipkart", Hub("flipkart", "test", _TEXT)),
        ),
    ),
    Task(
        "cola",
        "grammatical or not → the grammar test of GLUE-X",
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
        (_own("cola", _SENTENCE), _ood("grammar", Hub("grammar", "test", _SENTENCE))),
    ),
    Task(
        "mnli",
        "entailment, neutral or contradiction → mismatched genres, snli, sick",
        ("entailment", "neutral", "contradiction"),
        ("accuracy", "balanced_accuracy"),
        (
            _own("mnli", _PREMISE, "validation_matched"),
            _ood("mismatched", _glue("mnli", "validation_mismatched", _PREMISE)),
            _ood("snli", Hub("snli", "test", _PREMISE, "stanfordnlp/snli")),
            _ood("sick", Hub("sick", "test", _SICK)),
        ),
    ),
    Task(
        "rte",
        "entailment or not → hans, scitail",
        _ENTAILMENT,
        ("accuracy", "balanced_accuracy"),
        (
            _own("rte", _RTE),
            _ood("hans", Hub("hans", "validation", _pairs("premise", "hypothesis", _TWO_WAY), "jhu-cogsci/hans")),
            _ood(
                "scitail",
                Hub("scitail", "test", _pairs("premise", "hypothesis", _TWO_WAY), "allenai/scitail", "tsv_format"),
            ),
        ),
    ),
    Task(
        "mrpc",
        "paraphrase or not, news → questions (QQP), twitter",
        _PARAPHRASE,
        ("accuracy_f1", "accuracy", "f1"),
        (_own("mrpc", _SENTENCES), _ood("qqp", _glue("qqp", "validation", _QUESTIONS)), _TWITTER),
    ),
    Task(
        "qqp",
        "paraphrase or not, questions → news (MRPC), twitter",
        _PARAPHRASE,
        ("accuracy_f1", "accuracy", "f1"),
        (_own("qqp", _QUESTIONS), _ood("mrpc", _glue("mrpc", "test", _SENTENCES)), _TWITTER),
    ),
    Task(
        "qnli",
        "the sentence answers the question or not → qnli_ood of GLUE-X",
        _ENTAILMENT,
        ("accuracy", "balanced_accuracy"),
        (
            _own("qnli", _pairs("question", "sentence", _TWO_WAY)),
            _ood("qnli_ood", Hub("qnli_ood", "test", _pairs("question", "sentence", _TWO_WAY))),
        ),
    ),
    Task(
        "stsb",
        "similarity of sentences, a number → sick",
        (),
        ("pearson_spearman", "pearson", "spearman"),
        (_own("stsb", _SCORED), _ood("sick", Hub("sick", "test", _SICK_SCORE))),
        kind="regression",
    ),
)
"""Each with the metric that GLUE reports for it first."""
