"""Every entry of STRATEGIES keeps the contract of nbs/3_query/contract.ipynb, on pools that hypothesis makes up."""
import functools
import inspect

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dal_med.query.contract import Query
from dal_med.query.diversity import coreset
from dal_med.query.strategies import STRATEGIES

NEEDS_PASSES = ('bald', 'mean_std', 'dropquery')  # parts of the names of those that measure disagreement between passes


def fed(strategy):
    "The strategy; one that measures disagreement gets a second pass where a test has only one, which it would refuse."
    if not any(part in strategy.__name__ for part in NEEDS_PASSES): return strategy
    @functools.wraps(strategy)
    def with_passes(probs, *args, **options):
        one = probs if np.ndim(probs) == 2 else probs[0] if np.shape(probs)[:1] == (1,) else None
        return strategy(probs if one is None else np.stack([one, np.roll(one, 1, axis=1)]), *args, **options)
    return with_passes


every_strategy = pytest.mark.parametrize('strategy', [fed(s) for s in STRATEGIES.values()], ids=STRATEGIES)
DRAWS_LOTS = {'random', 'badge', 'kmeans_plus_plus'} | {name for name in STRATEGIES if name.startswith(('power_', 'softmax_', 'softrank_'))}  # their picks depend on row order through the random numbers
MAY_DRAW = {'kmeans', 'typiclust', 'probcover', 'clustered_margin', 'batchbald', 'dropquery'} & set(STRATEGIES)  # these use random numbers on the way, and another seed may still give the same picks
TIES_OFTEN = {'hybrid'}  # it sums ranks: of two images that are worth the same, the lower row is picked, in whatever order the pool is


@st.composite
def pools(draw):
    "probs, embeddings, labelled, budget: few distinct values, so that ties and copies are common"
    n, c, d, t = draw(st.integers(1, 24)), draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    probs = rng.integers(1, levels + 1, size=(max(t, 1), n, c)).astype(float)
    probs /= probs.sum(axis=2, keepdims=True)
    embeddings = rng.integers(0, levels, size=(n, d)) * draw(st.sampled_from([1., .1, 1e-6, 1e6]))
    labelled = rng.permutation(n)[:draw(st.integers(0, n - 1))]
    budget = draw(st.integers(0, n - len(labelled)))
    return (probs if t else probs[0]), embeddings, labelled, budget


def check_contract(strategy, probs, embeddings, labelled, budget, seed=0):
    "What holds for every call; returns the query."
    before = probs.copy(), embeddings.copy(), np.array(labelled, copy=True)
    global_state = np.random.get_state()[1].copy()
    query = strategy(probs, embeddings, labelled, budget, np.random.default_rng(seed))
    assert isinstance(query, Query)
    assert query.indices.dtype == np.int64 and query.scores.dtype == np.float64
    assert query.indices.shape == query.scores.shape == (budget,), 'exactly the budget'
    assert len(set(query.indices.tolist())) == budget, 'no duplicates'
    assert not set(query.indices.tolist()) & set(np.asarray(labelled).tolist()), 'never a labelled row'
    assert ((query.indices >= 0) & (query.indices < len(embeddings))).all(), 'rows of the pool'
    assert not np.isnan(query.scores).any() and (np.diff(query.scores[np.isfinite(query.scores)]) <= 0).all(), 'first choice first'
    again = strategy(probs, embeddings, labelled, budget, seed)
    assert np.array_equal(query.indices, again.indices) and np.array_equal(query.scores, again.scores), 'the seed decides, and an int is as good as a Generator'
    for was, now in zip(before, (probs, embeddings, labelled)): assert np.array_equal(was, now), 'inputs are not written to'
    assert np.array_equal(global_state, np.random.get_state()[1]), 'the global random state is not used'
    return query


@every_strategy
@settings(max_examples=100, deadline=None, derandomize=True)
@given(pool=pools(), seed=st.integers(0, 2**32 - 1))
def test_contract(strategy, pool, seed):
    query = check_contract(strategy, *pool, seed=seed)
    probs, embeddings, labelled, budget = pool
    shuffled = strategy(probs, embeddings, labelled[::-1], budget, seed)
    assert np.array_equal(query.indices, shuffled.indices), 'the order in which labels were bought does not matter'


@every_strategy
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pool=pools())
def test_layout_and_type_of_the_input_do_not_matter(strategy, pool):
    probs, embeddings, labelled, budget = pool
    query = strategy(probs, embeddings, labelled, budget, 3)
    spread = np.zeros((len(embeddings) * 2, embeddings.shape[1] * 3))[::2, ::3]
    spread[:] = embeddings
    assert not spread.flags.c_contiguous or spread.size <= 1
    same = strategy(np.asfortranarray(probs), spread, labelled.tolist(), np.int64(budget), 3)
    assert np.array_equal(query.indices, same.indices) and np.array_equal(query.scores, same.scores)


@every_strategy
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 40))
def test_permuting_the_pool_permutes_the_picks(strategy, seed, n):
    if strategy.__name__ in DRAWS_LOTS | MAY_DRAW: pytest.skip('its random numbers go by row')
    if strategy.__name__ in TIES_OFTEN: pytest.skip('its scores tie, and ties go by row')
    rng = np.random.default_rng(seed)  # continuous values: no ties
    probs, embeddings = rng.dirichlet([1.] * 4, size=(2, n)), rng.normal(size=(n, 5))
    order, labelled = rng.permutation(n), rng.permutation(n)[:rng.integers(1, n)]
    budget = (n - len(labelled) + 1) // 2
    plain = strategy(probs, embeddings, labelled, budget, 0)
    moved = strategy(probs[:, order], embeddings[order], np.argsort(order)[labelled], budget, 0)
    assert np.array_equal(plain.indices, order[moved.indices])
    assert np.array_equal(plain.scores, moved.scores)


def pool_of(n, c=3, d=2, t=None):
    rng = np.random.default_rng(n)
    return rng.dirichlet([1.] * c, size=(t, n) if t else n), rng.normal(size=(n, d))


@every_strategy
@pytest.mark.parametrize('n,c,d,labelled,budget', [(1, 3, 2, [], 1), (7, 3, 2, [], 7), (7, 3, 2, [2, 5], 5), (7, 1, 1, [0], 3), (3, 2, 2, [0, 1, 2], 0), (5, 2, 2, [4, 4, 1], 2)])
def test_corners(strategy, n, c, d, labelled, budget):
    check_contract(strategy, *pool_of(n, c, d), labelled, budget)


@every_strategy
@pytest.mark.parametrize('value', [0., 1., -3.5])
def test_all_equal_rows_and_zero_vectors(strategy, value):
    query = check_contract(strategy, np.full((9, 4), .25), np.full((9, 3), value), [4], 5)
    if strategy.__name__ not in DRAWS_LOTS | MAY_DRAW: assert query.indices.tolist() == [0, 1, 2, 3, 5], 'ties go to the lower row'


@every_strategy
def test_seed_changes_only_what_draws_lots(strategy):
    if strategy.__name__ in MAY_DRAW: pytest.skip('another seed may change its picks, and need not')
    probs, embeddings = pool_of(200)
    same = np.array_equal(strategy(probs, embeddings, [0], 10, 1).indices, strategy(probs, embeddings, [0], 10, 2).indices)
    assert same != (strategy.__name__ in DRAWS_LOTS)


@every_strategy
@pytest.mark.parametrize('where', ['probs', 'embeddings'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(strategy, where, value):
    tables = dict(zip(('probs', 'embeddings'), pool_of(12)))
    tables[where][[3, 8], 1] = value
    with pytest.raises(ValueError, match=rf'{where} is not finite in 2 of 12 rows \(3, 8\)'): strategy(**tables, labelled=[3], budget=2, rng=0)


@every_strategy
@pytest.mark.parametrize('change,message', [
    (dict(budget=10), 'budget is 10, but only 9 images of the pool are unlabelled'),
    (dict(budget=-1), 'budget is -1'),
    (dict(budget=1.5), 'whole number'),
    (dict(labelled=[12]), 'labelled names row 12'),
    (dict(labelled=[-1]), 'labelled names row -1'),
    (dict(labelled=np.arange(12) < 3), 'np.flatnonzero'),
    (dict(probs=np.full((12, 3), .5)), 'pass softmax probabilities'),
    (dict(probs=np.full((11, 4), .25)), 'probs has 11 rows and embeddings 12'),
    (dict(embeddings=np.zeros((2, 12, 2))), 'expected one row an image'),
    (dict(probs=np.zeros((0, 3)), embeddings=np.zeros((0, 3)), labelled=[], budget=0), 'none of them 0'),
])
def test_bad_input_is_a_clear_error(strategy, change, message):
    probs, embeddings = pool_of(12)
    with pytest.raises(ValueError, match=message): strategy(**(dict(probs=probs, embeddings=embeddings, labelled=[0, 4, 7], budget=2, rng=0) | change))


def as_tensors(torch, probs, embeddings, labelled, **kind):
    return torch.as_tensor(probs).to(**kind), torch.as_tensor(embeddings).to(**kind), torch.as_tensor(labelled).to(kind.get('device', 'cpu'))


@every_strategy
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_tensors_and_arrays_give_the_same_picks(strategy, dtype):
    torch = pytest.importorskip('torch')
    probs, embeddings = (table.astype(dtype) for table in pool_of(40, d=6, t=3))
    plain = strategy(probs, embeddings, np.array([0, 4]), 12, 0)
    p, x, labelled = as_tensors(torch, probs, embeddings, [0, 4])
    for tensors in [(p, x, labelled), (p.requires_grad_(), x.requires_grad_(), labelled), (p.mT.contiguous().mT, x.T.contiguous().T, labelled)]:
        query = strategy(*tensors, 12, 0)
        assert np.array_equal(plain.indices, query.indices) and np.array_equal(plain.scores, query.scores)


@every_strategy
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_is_taken_as_the_float32_that_it_is(strategy, dtype):
    torch = pytest.importorskip('torch')
    p, x, labelled = as_tensors(torch, *pool_of(40, d=6, t=3), [0, 4], dtype=getattr(torch, dtype))
    assert np.array_equal(strategy(p, x, labelled, 12, 0).indices, strategy(p.float(), x.float(), labelled, 12, 0).indices)


@every_strategy
@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16'])
def test_an_accelerator_gives_the_same_picks(strategy, dtype):
    torch = pytest.importorskip('torch')
    if not torch.cuda.is_available(): pytest.skip('no CUDA device here')
    p, x, labelled = as_tensors(torch, *pool_of(300, d=16, t=3), [0, 4], dtype=getattr(torch, dtype))
    there = strategy(p.cuda(), x.cuda(), labelled.cuda(), 40, 0)
    here = strategy(p, x, labelled, 40, 0)
    assert np.array_equal(here.indices, there.indices) and np.array_equal(here.scores, there.scores)


@every_strategy
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 40), scale=st.sampled_from([1., 1e-3, 1e4]), offset=st.sampled_from([0., 3.]))
def test_float32_and_float64_agree_where_separated(strategy, seed, n, scale, offset):
    rng = np.random.default_rng(seed)  # continuous values: no ties
    probs, embeddings = rng.dirichlet([1.] * 4, size=(3, n)), (rng.normal(size=(n, 5)) + offset) * scale
    labelled = rng.permutation(n)[:rng.integers(1, n)]
    budget = (n - len(labelled) + 1) // 2
    single, double = (strategy(probs.astype(t), embeddings.astype(t), labelled, budget, 0) for t in (np.float32, np.float64))
    assert np.array_equal(single.indices, double.indices)
    assert np.allclose(single.scores, double.scores, rtol=1e-4, atol=1e-6 * scale)


@every_strategy
def test_float32_views_with_gaps_are_taken(strategy):
    probs, embeddings = (table.astype(np.float32) for table in pool_of(40, d=6, t=3))
    wide = np.zeros((3, 80, 9), dtype=np.float32)
    wide[:, ::2, ::3] = probs
    spread = np.zeros((80, 18), dtype=np.float32)
    spread[::2, ::3] = embeddings
    query, same = strategy(probs, embeddings, [1], 9, 0), strategy(wide[:, ::2, ::3], spread[::2, ::3], [1], 9, 0)
    assert np.array_equal(query.indices, same.indices) and np.array_equal(query.scores, same.scores)


@pytest.mark.parametrize('dtype', [np.float32, np.float64, int])
def test_picks_are_rows_of_the_pool_not_of_what_is_unlabelled(dtype):
    assert coreset(None, np.array([[0], [100], [99], [-50]], dtype=dtype), [0], 2).indices.tolist() == [1, 3]


@every_strategy
def test_the_signature_is_the_contract(strategy):
    assert list(inspect.signature(strategy).parameters)[:5] == ['probs', 'embeddings', 'labelled', 'budget', 'rng']
