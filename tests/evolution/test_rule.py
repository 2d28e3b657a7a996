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


# Within a budget. Here a cost is additive: that of each conv that grows, and of each branch.

GROWTH = {'a': 0.1, 'b': 0.02, 'c': 0.3}
BRANCHES = {
    'x': {'1x1': 0.02, 'kx1': 0.1, '1x1-kxk': 0.2},
    'y': {'1x1': 0.02, 'kx1': 0.1},
}
WORTH = {'x': {'1x1': 0.1, 'kx1': 0.2, '1x1-kxk': 0.9}, 'y': {'1x1': 0.1, 'kx1': 0.3}}


def cost(grow, prune):
    total = 1 + sum(sum(values.values()) for values in BRANCHES.values())  # 1.44
    for path, names in grow.items():
        total += GROWTH[path] * (len(names) - 1) / 2
    for path, names in prune.items():
        total -= sum(BRANCHES[path][name] for name in names)
    return total


def within(most, scores=None, *, count=1, threshold=9.0, gains=None, importances=WORTH):
    operations = {path: ['kxk', '1x1', 'kx1'] for path in GROWTH}
    scores = {'a': 3.0, 'b': 1.0, 'c': 5.0} if scores is None else scores
    made = make_plan(
        *(scores, importances, operations),
        count=count,
        threshold=threshold,
        cost=cost,
        max_cost=most,
        gains=gains,
    )
    assert cost(made.grow, made.prune) <= most
    return Plan(made.grow, {path: sorted(names) for path, names in made.prune.items()})


def test_the_best_score_for_what_it_adds_grows_first():
    """50, 30 and 16.7 for a unit of cost."""
    assert list(within(9.0, count=3).grow) == ['b', 'a', 'c']
    assert list(within(9.0, count=1).grow) == ['b']


def test_what_does_not_fit_is_passed_over():
    assert within(1.57, count=3).grow.keys() == {'b', 'a'}
    assert within(1.78, {'a': 1.0, 'c': 300.0}, count=2).grow.keys() == {'c'}
    assert within(1.55, {'a': 1.0, 'c': 300.0}, count=2) == Plan({'a': ['kxk', '1x1', 'kx1']}, {})


def test_of_scores_below_zero_the_cheap_one_is_first():
    assert list(within(9.0, {'a': -1.0, 'b': -2.0, 'c': -0.9}, count=3).grow) == ['b', 'a', 'c']
    assert list(within(9.0, {'a': 0.0, 'b': -1.0, 'c': 1.0}, count=3).grow) == ['c', 'a', 'b']


def test_with_fewer_branches_if_the_score_knows():
    gains = {'c': {'1x1': 1.0, 'kx1': 2.0}}
    assert within(1.6, {'c': 1.0}, gains=gains).grow == {'c': ['kxk', 'kx1']}
    assert within(1.75, {'c': 1.0}, gains=gains).grow == {'c': ['kxk', '1x1', 'kx1']}
    assert within(1.6, {'c': 1.0}, gains=gains, threshold=None).prune == {}


def test_pruning_makes_room_for_the_best():
    """Importance for cost saved: kx1 of x 2, 1x1 of x and y 5; the best of each stay."""
    grown = {'b': ['kxk', '1x1', 'kx1']}
    assert within(1.44) == within(1.45) == Plan(grown, {'x': ['kx1']})
    grown = {'a': ['kxk', '1x1', 'kx1']}
    assert within(1.44, {'a': 1.0}) == Plan(grown, {'x': ['kx1']})
    assert within(1.43, {'a': 1.0}) == Plan(grown, {'x': ['1x1', 'kx1']})
    assert within(1.41, {'a': 1.0}) == Plan(grown, {'x': ['1x1', 'kx1'], 'y': ['1x1']})


def test_what_need_not_go_stays():
    """Once a large branch goes, a small one of less importance for its cost need not."""
    importances = {**WORTH, 'x': {'1x1': 0.01, 'kx1': 0.2, '1x1-kxk': 0.9}}
    made = within(1.44, {'a': 1.0}, importances=importances)
    assert made == Plan({'a': ['kxk', '1x1', 'kx1']}, {'x': ['kx1']})


def test_nothing_grows_for_which_no_room_can_be_made():
    """The best branch of a block stays: 0.14 at most can go."""
    assert within(1.44, {'c': 1.0}) == Plan({}, {})
    assert within(1.44, {'c': 9.0, 'a': 0.1}).grow.keys() == {'a'}
    assert within(1.44, threshold=None) == Plan({}, {})  # nor without pruning


def test_no_room_is_made_of_new_branches():
    new = {path: dict.fromkeys(values, 0.01) for path, values in WORTH.items()}
    assert within(1.44, importances=new) == Plan({}, {})


def test_no_room_is_made_where_nothing_grows():
    assert within(1.44, count=0) == within(1.44, {}) == Plan({}, {})


def test_what_costs_too_much_is_pruned():
    assert within(1.4, {}) == Plan({}, {'x': ['kx1']})
    assert within(1.3, {}) == Plan({}, {'x': ['1x1', 'kx1'], 'y': ['1x1']})
    # The best branches at last.
    assert within(1.2, {}) == Plan({}, {'x': ['1x1', 'kx1'], 'y': ['1x1', 'kx1']})
    assert within(1.0, {}).prune == {path: sorted(values) for path, values in WORTH.items()}


def test_weak_branches_go_anyway():
    """And what they cost is free for others."""
    made = within(1.44, {'a': 1.0}, threshold=0.05)
    assert made == Plan({'a': ['kxk', '1x1', 'kx1']}, {'x': ['1x1', 'kx1'], 'y': ['1x1']})


def test_a_conv_without_a_known_size_does_not_grow():
    def unknown(grow, prune):
        return math.inf if 'a' in grow else 1.0

    made = make_plan(
        {'a': 0.0, 'b': -1.0}, {}, {'a': ['kxk', '1x1'], 'b': ['kxk', '1x1']},
        count=2, threshold=0.02, cost=unknown, max_cost=1.1,
    )  # fmt: skip
    assert list(made.grow) == ['b']


def test_what_goes_for_others_takes_along_what_lies_in_it():
    inner = 'x.branches.1x1-kxk.conv'
    importances = {'x': {'1x1': 0.9, '1x1-kxk': 0.1}, inner: {'1x1': 0.1, 'kx1': 0.2}}

    def nested(grow, prune):
        left = 0.0 if '1x1-kxk' in prune.get('x', ()) else 0.2 - 0.01 * len(prune.get(inner, ()))
        return 1 + left + 0.1 * len(grow)

    names = ['kxk', '1x1']
    made = make_plan(
        {f'{inner}.branches.kxk': 9.0, 'b': 1.0},
        importances,
        {f'{inner}.branches.kxk': names, 'b': names},
        count=1,
        threshold=9.0,
        cost=nested,
        max_cost=1.2,
    )
    assert made.grow == {'b': names}
    assert made.prune == {'x': ['1x1-kxk']}
