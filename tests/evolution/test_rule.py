"""The rule of the paper, on plain numbers."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrep_mm.evolution.rule import make_plan, weak_branches
from dyrep_mm.surgery.structure import Plan


def plan(scores=None, importances=None, grow=1, threshold=0.02):
    scores, importances = scores or {}, importances or {}
    operations = {path: ['kxk', '1x1'] for path in scores}
    made = make_plan(scores, importances, operations, count=grow, threshold=threshold)
    assert all(names == ['kxk', '1x1'] for names in made.grow.values())
    assert (made.scores, made.importances) == (scores, importances)
    return Plan(list(made.grow), made.prune)


SCORES = {'a': 0.1, 'b': 3.0, 'c': -5.0, 'd': 2.0}


@pytest.mark.parametrize(
    ('grow', 'expected'), [(0, []), (1, ['b']), (2, ['b', 'd']), (9, ['b', 'd', 'a', 'c'])]
)
def test_the_best_grow_the_best_first(grow, expected):
    assert plan(SCORES, grow=grow) == Plan(expected, {})


def test_the_score_is_signed():
    assert plan({'a': -2.0, 'b': -1.0, 'c': -9.0}).grow == ['b']


def test_the_first_of_equals_grows():
    """Ties must not depend on anything that differs between ranks or runs."""
    assert plan({'a': 1.0, 'b': 2.0, 'c': 2.0, 'd': 2.0}).grow == ['b']
    assert plan({'d': 0.0, 'a': 0.0, 'c': 0.0}, grow=2).grow == ['d', 'a']


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_do_not_grow(bad):
    assert plan({'a': bad, 'b': 1.0, 'c': bad}, grow=3).grow == ['b']
    assert plan({'a': bad}).grow == []


def test_nothing_to_score():
    assert plan() == Plan([], {})


def test_weak_branches_by_hand():
    # Mean 0.04, standard deviation 0.0294.
    values = {'1x1': 0.02, '1xk': 0.02, 'identity': 0.02, 'kx1': 0.1}
    mean, deviation = 0.04, math.sqrt((3 * 0.02**2 + 0.06**2) / 4)
    assert deviation == pytest.approx(0.0346, abs=1e-4)
    assert all((v < mean) == (n != 'kx1') for n, v in values.items())
    assert weak_branches(values, 0.02) == ['1x1', '1xk', 'identity']
    assert weak_branches(values, deviation - 1e-9) == ['1x1', '1xk', 'identity']
    assert weak_branches(values, deviation + 1e-9) == []


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text('abcdef', min_size=1), st.floats(0, 1), min_size=2, max_size=6),
    st.floats(0, 0.5),
)
def test_weak_branches_is_the_formula(values, threshold):
    mean = statistics.fmean(values.values())
    spread = statistics.pstdev(values.values())
    expected = [n for n, v in values.items() if v < mean] if spread > threshold else []
    weak = weak_branches(values, threshold)
    assert weak == expected
    assert len(weak) < len(values)  # one branch stays


@pytest.mark.parametrize('values', [{}, {'1x1': 0.0}, {'1x1': 9.0}])
def test_with_one_branch_there_is_no_spread(values):
    assert weak_branches(values, 0.0) == []


def test_a_branch_of_mean_importance_stays():
    assert weak_branches({'a': 0.0, 'b': 0.5, 'c': 1.0}, 0.02) == ['a']


def test_equal_branches_stay():
    assert weak_branches({'a': 0.01, 'b': 0.01, 'c': 0.01}, 0.0) == []


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_importances_that_are_not_finite_prune_nothing(bad):
    assert weak_branches({'a': 0.0, 'b': 1.0, 'c': bad}, 0.02) == []


@pytest.mark.parametrize(
    ('median', 'sigma', 'below', 'left'),
    [
        (0.05, 0.5, None, 3.6),
        (0.05, 0.5, 0.1, 3.3),
        (0.1, 0.5, None, 2.0),
        (0.1, 0.5, 0.1, 3.2),
        (0.2, 0.2, None, 2.5),
        (0.2, 0.2, 0.1, 6.0),
        (0.2, 0.5, None, 1.4),
        (0.2, 0.5, 0.1, 5.5),
        (0.4, 0.5, None, 1.2),
        (0.4, 0.5, 0.1, 6.0),
    ],
)
def test_the_two_rules_until_nothing_goes(median, sigma, below, left):
    """Six branches of lognormal importances: the paper's rule eats a block down to its best
    branch, the bound of the authors' code leaves what matters."""
    draws, total = random.Random(0), 0
    for _ in range(1000):
        values = {name: draws.lognormvariate(math.log(median), sigma) for name in 'abcdef'}
        best = max(values, key=values.get)
        while weak := weak_branches(values, 0.02, below=below):
            values = {name: value for name, value in values.items() if name not in weak}
        assert best in values
        total += len(values)
    assert total / 1000 == pytest.approx(left, abs=0.15)


def test_with_a_bound_the_deviation_is_unbiased():
    """Two branches: the deviations are 0.02, which is not above lambda, and 0.028."""
    values = {'1x1': 0.01, 'kx1': 0.05}
    assert weak_branches(values, 0.02) == []
    assert weak_branches(values, 0.02, below=0.1) == ['1x1']
    assert weak_branches(values, 0.03, below=0.1) == []


def test_what_is_above_the_bound_stays():
    values = dict(zip('abcdef', (0.5, 0.12, 0.11, 0.3, 0.2, 0.15), strict=True))
    assert weak_branches(values, 0.02) == ['b', 'c', 'e', 'f']
    assert weak_branches(values, 0.02, below=0.1) == []
    assert weak_branches(values, 0.02, below=0.115) == ['c']


@pytest.mark.parametrize('below', [None, 0.1])
@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e3])
def test_a_relative_threshold_knows_no_scale(scale, below):
    values = {'a': 0.5 * scale, 'b': 1.0 * scale, 'c': 1.5 * scale}
    deviation = 0.5 if below else math.sqrt(0.5 / 3)  # of the mean
    bound = below and below * scale * 10
    assert weak_branches(values, 0.99 * deviation, relative=True, below=bound) == ['a']
    assert weak_branches(values, 1.01 * deviation, relative=True, below=bound) == []


def test_branches_that_are_all_dead_stay():
    """There is nothing to tell them apart."""
    assert weak_branches({'a': 0.0, 'b': 0.0}, 0.0, relative=True) == []


SPREAD = {'1x1': 0.01, '1x1-kxk': 0.01, 'identity': 0.2}


def test_a_dead_branch_goes():
    assert plan(importances={'a': {'1x1': 0.0, 'kx1': 0.1}}).prune == {'a': ['1x1']}


def test_prune_per_block():
    importances = {'a': SPREAD, 'b': {'1x1': 0.01, 'kx1': 0.011}, 'c': {'1x1': 0.5, 'kx1': 0.1}}
    assert plan(importances=importances).prune == {'a': ['1x1', '1x1-kxk'], 'c': ['kx1']}


def test_pruning_can_be_off():
    assert plan(SCORES, {'a': SPREAD}, threshold=None) == Plan(['b'], {})


def test_the_threshold_is_a_limit_not_a_factor():
    assert plan(importances={'a': SPREAD}, threshold=0.1).prune == {}
    assert plan(importances={'a': SPREAD}, threshold=0.05).prune.keys() == {'a'}


def test_the_plan_takes_the_form_of_the_threshold():
    def pruned(**more):
        importances = {'a': {'1x1': 0.2, 'kx1': 0.6}, 'b': {'1x1': 0.001, 'kx1': 0.002}}
        return make_plan({}, importances, {}, count=1, **more).prune

    assert pruned(threshold=0.1) == {'a': ['1x1']}
    assert pruned(threshold=0.1, relative=True) == {'a': ['1x1'], 'b': ['1x1']}
    assert pruned(threshold=0.1, relative=True, below=0.1) == {'b': ['1x1']}


def test_nothing_grows_in_a_branch_that_goes():
    scores = {
        'a.branches.1x1-kxk.conv': 9.0,  # goes
        'a.branches.1x1-kxk.conv.branches.kxk': 8.0,  # goes with it
        'a.branches.kxk': 7.0,
        'b': 1.0,
    }
    assert plan(scores, {'a': SPREAD}, grow=3).grow == ['a.branches.kxk', 'b']
    assert plan(scores, {'a': SPREAD}, grow=1, threshold=None).grow == ['a.branches.1x1-kxk.conv']


def test_a_block_in_a_branch_that_goes_is_not_pruned():
    importances = {'a': SPREAD, 'a.branches.1x1-kxk.conv': SPREAD, 'a.branches.kxk': SPREAD}
    weak = ['1x1', '1x1-kxk']
    assert plan(importances=importances).prune == {'a': weak, 'a.branches.kxk': weak}


def test_names_that_begin_alike_are_not_inside():
    importances = {'a': {'1x1': 0.0, '1x1-kxk': 0.3}, 'ab': SPREAD}
    scores = {'a.branches.1x1-kxk.conv': 2.0, 'ab.branches.1x1.conv': 1.0}
    result = plan(scores, importances, grow=2, threshold=0.1)
    assert result == Plan(['a.branches.1x1-kxk.conv', 'ab.branches.1x1.conv'], {'a': ['1x1']})


def test_a_plan_is_fixed():
    with pytest.raises(AttributeError):
        plan().grow = []
    assert Plan().prune is not Plan().prune
