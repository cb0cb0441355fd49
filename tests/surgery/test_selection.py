"""Which modules stay, worked out by hand from made-up counts."""

from __future__ import annotations

import pytest
import torch

from emoe.errors import UserError
from emoe.surgery.modules import ModuleSet, Seen
from emoe.surgery.selection import normalised, select
from emoe.surgery.usage import Use


def chosen(
    counts: dict[str, list[float]],
    *,
    pinned: int = 0,
    groups: dict[str, tuple[int, ...]] | None = None,
    **settings,
) -> dict[str, list[int]]:
    """What `select` keeps of sets that are called, as in reports, by layer and kind."""
    sets, groups = [], groups or {}
    for name, count in counts.items():
        layer, kind = name.split(".")
        sets.append(ModuleSet(int(layer), kind, groups.get(name, (len(count),)), (), 4, pinned))
    use = {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}
    common = {"by": "max", "keep": None, "threshold": None, "scope": "model", "floor": 1}
    return select(sets, use, **common | settings)[0]


# Over its maximum: .7 1 .8 .9 .75 .85, and .44 1 .22 .56. Over its sum: .14 .2 .16 .18 .15 .17, and .2 .45 .1 .25.
FLAT_AND_STEEP = {"0.ffn": [7, 10, 8, 9, 7.5, 8.5], "1.ffn": [4, 9, 2, 5]}


@pytest.mark.parametrize(
    ("by", "scope", "first", "second"),
    [
        ("max", "model", [1, 2, 3, 5], [1]),
        ("sum", "model", [1, 3], [0, 1, 3]),
        ("max", "layer", [1, 3, 5], [1, 3]),
        ("sum", "layer", [1, 3, 5], [1, 3]),
    ],
)
def test_the_most_used_half_stays(by, scope, first, second):
    assert chosen(FLAT_AND_STEEP, by=by, scope=scope, keep=0.5) == {"0.ffn": first, "1.ffn": second}


def test_the_order_of_layers_and_modules_is_all_that_tells_ties_apart():
    ties = {"0.ffn": [2, 2, 1, 2], "1.ffn": [5, 5, 5, 0]}
    assert chosen(ties, keep=0.5) == {"0.ffn": [0, 1, 3], "1.ffn": [0]}
    assert chosen(ties, keep=0.5, scope="layer") == {"0.ffn": [0, 1], "1.ffn": [0, 1]}


def test_rounding_makes_no_difference_but_use_does():
    assert chosen({"0.ffn": [1, 1 + 1e-12]}, keep=0.5) == {"0.ffn": [0]}
    assert chosen({"0.ffn": [1, 1 + 1e-6]}, keep=0.5) == {"0.ffn": [1]}


def test_at_least_one_module_stays():
    assert chosen({"0.ffn": [1, 3, 2]}, keep=0.01) == {"0.ffn": [1]}


def test_attention_and_ffn_are_ranked_apart():
    """Together, one of attention and three of the FFN would be the best four."""
    counts = {"0.attention": [1, 10, 1, 5], "0.ffn": [9, 9, 10, 8]}
    assert chosen(counts, keep=0.5) == {"0.attention": [1, 3], "0.ffn": [0, 2]}


def test_each_kind_is_ranked_over_all_layers():
    counts = {"0.attention": [4, 3], "0.ffn": [1, 9], "1.attention": [9, 1], "1.ffn": [4, 5]}
    kept = {"0.attention": [0, 1], "0.ffn": [1], "1.attention": [0], "1.ffn": [0, 1]}
    assert chosen(counts, keep=0.75) == kept


# Over its sum: .6 .4, and .1 .2 .3 .1 .1 .2: of a quarter of both nothing falls to the second layer.
UNEQUAL = {"0.ffn": [6, 4], "1.ffn": [1, 2, 3, 1, 1, 2]}


@pytest.mark.parametrize(("floor", "second"), [(1, [2]), (2, [1, 2])])
def test_the_floor_takes_the_most_used_of_what_is_left(floor, second):
    assert chosen(UNEQUAL, by="sum", keep=0.25, floor=floor) == {"0.ffn": [0, 1], "1.ffn": second}


def test_the_floor_adds_to_what_stays_anyway():
    assert chosen(UNEQUAL, keep=0.34, scope="layer", floor=2) == {"0.ffn": [0, 1], "1.ffn": [1, 2]}


def test_a_layer_that_was_never_used_comes_last():
    counts = {"0.ffn": [0, 0, 0, 0], "1.ffn": [3, 4, 1, 2]}
    assert normalised(torch.zeros(3), "max").tolist() == normalised(torch.zeros(3), "sum").tolist() == [0, 0, 0]
    assert chosen(counts, keep=0.5) == {"0.ffn": [0], "1.ffn": [0, 1, 2, 3]}
    with pytest.raises(UserError, match="--floor: layer 0 is left without ffn experts"):
        chosen(counts, keep=0.5, floor=0)


def test_the_floor_is_of_the_budget_alone():
    """Modules that were added, however much they are used, leave no choice within K."""
    added = {"0.ffn": (3, 2)}
    assert chosen({"0.ffn": [1, 3, 2, 9, 8]}, groups=added, keep=0.4) == {"0.ffn": [1, 3, 4]}
    with pytest.raises(UserError, match="--floor: layer 0 has 3 ffn experts, fewer than 4"):
        chosen({"0.ffn": [1, 3, 2, 9, 8]}, groups=added, keep=0.4, floor=4)


def test_pinned_modules_stay_and_are_counted():
    """A half of four is the pinned one and the best; of eight, both pinned ones and the two best of both layers."""
    assert chosen({"0.ffn": [0, 3, 5, 4]}, pinned=1, keep=0.5) == {"0.ffn": [0, 2]}
    two = {"0.ffn": [0, 9, 10, 1], "1.ffn": [0, 4, 10, 8]}
    assert chosen(two, pinned=1, keep=0.5) == {"0.ffn": [0, 2], "1.ffn": [0, 2]}
    assert chosen(two, pinned=2, keep=0.25) == {"0.ffn": [0, 1], "1.ffn": [0, 1]}  # more than --keep leaves
    assert chosen(two, pinned=1, threshold=0.85) == {"0.ffn": [0, 1, 2], "1.ffn": [0, 2]}


@pytest.mark.parametrize(
    ("by", "threshold", "first", "second"),
    [("max", 0.5, [0, 1], [1, 2, 3]), ("sum", 0.25, [0, 1], [1, 2]), ("max", 0.0, [0, 1, 2, 3], [0, 1, 2, 3])],
)
def test_all_that_reach_the_threshold_stay(by, threshold, first, second):
    """Over the maximum 1 .5 .3 .2, and 0 1 .9 .6; over the sum .5 .25 .15 .1, and 0 .4 .36 .24."""
    counts = {"0.ffn": [10, 5, 3, 2], "1.ffn": [0, 10, 9, 6]}
    assert chosen(counts, by=by, threshold=threshold) == {"0.ffn": first, "1.ffn": second}


def test_what_is_counted():
    """Of three tokens, two of which choose one module only."""
    p_NE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.15, 0.05, 0.8]])
    chosen_NK = torch.tensor([[0, 2], [-1, 1], [0, -1]])
    energy_NE = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0], [1.0, 2.0, 5.0]])
    weights_NK = p_NE.gather(1, chosen_NK.clamp_min(0))
    use = Use(3)
    for part in (slice(0, 2), slice(2, 3)):  # sums go on over calls
        seen = (torch.zeros(3, 4), chosen_NK, p_NE.log(), weights_NK, energy_NE)
        use.add(Seen(*(found[part] for found in seen), None))
    assert use.tokens == 3
    assert use.of("hard").tolist() == [2, 1, 1]
    assert use.of("probability").tolist() == pytest.approx([0.65, 0.6, 0.2])
    assert use.of("energy").tolist() == pytest.approx([0.75 + 0.125, 0.25 + 0.25, 1 + 0.625])
