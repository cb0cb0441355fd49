"""The split methods: what each reads, what it promises, and how the registry answers."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.clustering import SplitInputs, available, get
from emoe.clustering.balanced import canonical_labels
from emoe.clustering.spec import unit_rows
from emoe.errors import UserError


def inputs(num_neurons=48, seed=0):
    random = np.random.default_rng(seed)
    features_FP = (random.random((num_neurons, 20)) < 0.3).astype(np.float32)
    features_FP[:7] = 0  # neurons that never fire
    return SplitInputs(num_neurons, random.normal(size=(num_neurons, 10)).astype(np.float32), features_FP)


@pytest.mark.parametrize("name", available())
def test_every_method_describes_itself(name):
    method = get(name)
    assert method.name == name and method.needs in ("features", "keys", "nothing")
    assert method.reference and method.summary and "\n" not in method.summary


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("num_experts", [1, 6, 48])  # one expert, some, one neuron each
def test_every_method_gives_a_repeatable_equal_partition(name, num_experts):
    first_F, again_F = (get(name).split(inputs(), num_experts, seed=3) for _ in range(2))
    assert first_F.dtype == np.int32 and first_F.shape == (48,)
    assert (np.bincount(first_F, minlength=num_experts) == 48 // num_experts).all()
    assert (first_F == again_F).all()


@pytest.mark.parametrize("name", available())
def test_every_method_names_the_nearest_divisors(name):
    with pytest.raises(UserError, match=r"is not divisible by .*=5; try 4 or 6"):
        get(name).split(inputs(), 5, seed=0)


@pytest.mark.parametrize("name", available())
def test_a_method_reads_only_what_it_says_it_needs(name):
    full, needs = inputs(), get(name).needs
    keys_FD = full.keys_FD if needs == "keys" else None
    features_FP = full.features_FP if needs == "features" else None
    alone_F = get(name).split(SplitInputs(48, keys_FD, features_FP), 6, seed=1)
    assert (alone_F == get(name).split(full, 6, seed=1)).all()


@pytest.mark.parametrize("name, what", [("weights", "keys"), ("coactivation", "features")])
def test_missing_and_misshapen_inputs_are_named(name, what):
    with pytest.raises(UserError, match=f"--split {name} needs .*{what}"):
        get(name).split(SplitInputs(48), 6, seed=0)
    rows = np.ones((47, 3))
    with pytest.raises(UserError, match=r"shape \(47, 3\), expected \(48, width\)"):
        get(name).split(SplitInputs(48, rows, rows), 6, seed=0)


@pytest.mark.parametrize("name, field", [("weights", "keys_FD"), ("coactivation", "features_FP")])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuted_and_rescaled_neurons_give_the_permuted_partition(name, field, seed):
    """Scales are powers of two: they change the length of a row without rounding, so the law holds to the last bit."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(36, 6))  # distinct, so that no two rows can change places
    order_F = random.permutation(36)
    moved = (rows * 2.0 ** random.integers(-5, 5, size=(36, 1)))[order_F]
    method = get(name)
    labels_F = method.split(SplitInputs(36, **{field: rows}), 6, seed=0)
    moved_F = method.split(SplitInputs(36, **{field: moved}), 6, seed=0)
    assert (moved_F == canonical_labels(labels_F[order_F])).all()


def test_silent_neurons_gather_in_one_expert():
    random = np.random.default_rng(0)
    features_FP = np.concatenate([np.zeros((8, 64)), random.random((24, 64)) < 0.4])
    order_F = random.permutation(32)
    labels_F = get("coactivation").split(SplitInputs(32, features_FP=features_FP[order_F]), 4, seed=0)
    assert len(set(labels_F[order_F < 8])) == 1


def test_clustering_leaves_the_callers_keys_as_they_are():
    given_inputs = inputs()
    before_FD = given_inputs.keys_FD.copy()
    get("weights").split(given_inputs, 6, seed=0)
    assert (given_inputs.keys_FD == before_FD).all()


def test_random_is_random_and_contiguous_is_contiguous():
    random_F, other_F = (get("random").split(SplitInputs(1536), 64, seed=s) for s in (0, 1))
    blocks_F = get("contiguous").split(SplitInputs(1536), 64, seed=0)
    assert blocks_F.tolist() == np.repeat(range(64), 24).tolist()
    assert (random_F != other_F).any()
    # 1,535 neighbours share an expert of 24 with probability 23 / 1535: 23 expected, against 1,472 in blocks.
    assert (random_F[1:] == random_F[:-1]).sum() < 60


def test_unit_rows_have_length_one_or_zero_whatever_their_scale():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [3e-200, 4e-200], [3e200, -4e200]])
    np.testing.assert_allclose(unit_rows(rows), [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, -0.8]], rtol=1e-12)


def test_an_unknown_method_is_answered_with_the_flag_the_names_and_the_nearest():
    with pytest.raises(UserError) as error:
        get("coactivaton")
    assert "--split coactivaton" in str(error.value) and "did you mean 'coactivation'?" in str(error.value)
    assert all(name in str(error.value) for name in available())


def test_importing_the_package_loads_no_heavy_library():
    program = "import sys, emoe.clustering; print([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    variables = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
