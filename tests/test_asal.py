"""asal keeps the contract of the strategies, with synthetic images given; it stands outside STRATEGIES because it cannot do without them."""
import functools
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from dal_med.query import STRATEGIES, asal
from test_query_contract import check_contract, pools


def with_synthetic(embeddings, seed):
    "The strategy, told of a few images near and far from the pool."
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(embeddings), size=rng.integers(1, 6))
    synthetic = embeddings[rows] + rng.normal(size=(len(rows), embeddings.shape[1]))*rng.choice([0, .1, 10])
    return functools.partial(asal, synthetic=synthetic)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pool=pools(), seed=st.integers(0, 2**32 - 1))
def test_contract(pool, seed):
    probs, embeddings, labelled, budget = pool
    strategy = with_synthetic(embeddings, seed)
    query = check_contract(strategy, *pool, seed=seed)
    assert np.array_equal(query.indices, strategy(probs, embeddings, labelled[::-1], budget, seed).indices), 'the order in which labels were bought does not matter'
    assert np.array_equal(query.indices, strategy(None, np.asfortranarray(embeddings), labelled, budget, seed + 1).indices), 'neither predictions, nor layout, nor chance matter'
    assert np.array_equal(query.indices[:budget//2], strategy(probs, embeddings, labelled, budget//2, seed).indices), 'a smaller budget picks the same first'


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pool=pools(), seed=st.integers(0, 2**32 - 1))
def test_row_order_matters_in_ties_only(pool, seed):
    "In general position the picks are the same images however the pool is ordered."
    probs, _, labelled, budget = pool
    n, rng = probs.shape[-2], np.random.default_rng(seed)
    embeddings, order = rng.normal(size=(n, 3)), rng.permutation(n)
    strategy = with_synthetic(embeddings, seed)
    place = np.argsort(order)
    moved = strategy(None, embeddings[order], place[labelled], budget, 0).indices
    assert np.array_equal(order[moved], strategy(None, embeddings, labelled, budget, 0).indices)


def test_needs_synthetic_images_and_so_is_no_entry():
    assert 'asal' not in STRATEGIES
    with pytest.raises(ValueError, match='synthetic is None.*give their embeddings'): asal(None, np.eye(3), [], 1, 0)
