"""The search of RepNAS in real runs: its phases, what is computed and trains, what files hold."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim.optimizer import amp_optimizer_wrapper

import dyrep_mm
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.engine.runner import unwrap
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.report.data import read_run
from dyrep_mm.report.page import make_report
from dyrep_mm.surgery.cost import branch_costs
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.structure import structure_of
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_data, assert_equal_states, assert_same, assert_same_run
from support.nets import output_of
from support.runs import FAST, SEARCH, TinyClassifier, call_at, dyrep, runner, write_config

EMA = {'type': 'EMAHook', 'momentum': 0.2}
#: Branches of the tiny classifier with all operations, and the part of them that is on.
BRANCHES, ON = 22, 7


def branches_of(run) -> dict[tuple[str, str], torch.nn.Module]:
    blocks = blocks_of(unwrap(run.model))
    return {(p, name): b.branches[name] for p, b in blocks.items() for name in b.names[1:]}


def on_in(run) -> set[tuple[str, str]]:
    return {place for place, branch in branches_of(run).items() if branch.is_on}


def alphas_of(run) -> torch.Tensor:
    return dyrep(run).rule.sampler.alphas.detach().clone()


@pytest.fixture
def _amp_on_cpu(monkeypatch):
    """Let mmengine's wrapper, which asks for an accelerator, use torch's scaler for the CPU."""
    scaler = functools.partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    """A whole run with an average, and its checkpoints."""
    folder = tmp_path_factory.mktemp('searched')
    run = runner(folder, [dict(SEARCH), EMA], iters=9)
    run.train()
    return run, folder


@pytest.mark.parametrize('unit', [{'iters': 9}, {'epochs': 9}])
def test_the_phases(tmp_path, unit):
    """All operations at once; alphas wait, then move; the best stay, and training goes on."""
    run = runner(tmp_path, [dict(SEARCH)], **unit)
    seen, structures = [], []

    def look(run):
        hook = dyrep(run)
        alphas = None if hook.rule.sampler is None else hook.rule.sampler.alphas.detach().clone()
        seen.append((len(branches_of(run)), alphas))

    call_at(run, look, 'after_train_iter' if 'iters' in unit else 'after_train_epoch')
    call_at(run, lambda run: structures.append(structure_of(run.model)), 'before_train_iter')
    run.train()
    assert set(structures[0]) == {f'backbone.{name}' for name in ('conv1', 'conv2', 'conv3', 'dw')}
    assert [count for count, _ in seen] == [BRANCHES] * 5 + [ON] * 4
    moved = [None if alphas is None else bool(alphas.any()) for _, alphas in seen]
    assert moved == [False] * 2 + [True] * 3 + [None] * 4
    entries = dyrep(run).journal
    assert [entry.at for entry in entries] == [2, 6]
    assert [bool(entry.pruned) for entry in entries] == [False, True]
    assert all(len(entry.scores) == BRANCHES for entry in entries)
    # Exactly the best by the alphas that the journal tells.
    best = sorted(entries[1].scores, key=entries[1].scores.__getitem__, reverse=True)[:ON]
    kept = {f'{path}.branches.{name}' for path, name in branches_of(run)}
    assert kept == set(best)
    assert all(branch.gate == 1 for branch in branches_of(run).values())


def test_looks_between_the_phases(tmp_path):
    run = runner(tmp_path, [{**SEARCH, 'interval': 3, 'branch_norm': 'fixed'}], iters=14)
    run.train()
    entries = dyrep(run).journal
    assert [entry.at for entry in entries] == [2, 3, 6, 9, 11]
    assert [bool(entry.pruned) for entry in entries] == [False] * 4 + [True]
    # Only what is on costs.
    assert entries[0].multiply_adds < 2 * entries[-1].multiply_adds


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('kind', ['Adam', 'SGD', 'fused'])
def test_everything_steps_when_it_is_on(tmp_path, kind, accumulate):
    """A branch steps where it was on since the last step; alphas step in the search alone, and
    the number on is the same in every iteration."""
    optimizer = {
        'Adam': {'type': 'Adam', 'lr': 0.01},
        'SGD': {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'weight_decay': 0.1},
        'fused': {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'fused': True},
    }[kind]
    wrapper = {'optimizer': optimizer, 'accumulative_counts': accumulate}
    run = runner(tmp_path, [{**SEARCH, 'fixed': 4}], iters=12, optim_wrapper=wrapper)
    numbers, recent, steps, still, before = [], set(), {}, [], {}

    def draw(run):
        numbers.append(len(on_in(run)))
        recent.update(on_in(run))
        if not before:
            before.update({p: weights(run, p) for p in branches_of(run)})

    def weights(run, place):
        return [p.detach().clone() for p in branches_of(run)[place].parameters()]

    def count(run):
        check_optimizer(run.optim_wrapper.optimizer, run.model)
        if not run.optim_wrapper.should_update():
            return
        for place in branches_of(run):
            steps[place] = steps.get(place, 0) + (place in recent)
            if place in before and place not in recent:
                now = weights(run, place)
                still.append(all(map(torch.equal, before[place], now)))
        recent.clear()
        before.clear()

    call_at(run, draw, 'before_train_iter')
    call_at(run, count)
    alpha_steps = []

    def count_alphas(run):
        if (sampler := dyrep(run).rule.sampler) is not None:
            state = sampler.optimizer.state.get(sampler.alphas, {})
            alpha_steps.append(int(state.get('step', 0)))

    call_at(run, count_alphas)
    run.train()
    assert numbers == [ON] * 12
    assert still
    assert all(still)  # no momentum and no decay either
    expected = [0, 0, 1, 2, 3, 4, 5] if accumulate == 1 else [0, 0, 0, 1, 1, 2, 2]
    assert alpha_steps == expected
    if kind == 'Adam':
        state = run.optim_wrapper.optimizer.state
        for place, branch in branches_of(run).items():
            assert {int(state[p]['step']) for p in branch.parameters()} == {steps[place]}
        weight = run.model.backbone.conv1
        origin = getattr(weight, 'origin', weight).weight
        assert int(state[origin]['step']) == 12 // accumulate


def test_a_block_that_lost_all_is_its_conv(tmp_path):
    run = runner(tmp_path, [dict(SEARCH)], iters=9)

    def lose(run):
        rule = dyrep(run).rule
        with torch.no_grad():
            for place, (path, _) in enumerate(rule.places):
                if path == 'backbone.conv2':
                    rule.sampler.alphas[place] = -10.0

    call_at(run, lose)
    run.train()
    assert structure_of(run.model)
    assert 'backbone.conv2' not in structure_of(run.model)
    assert type(run.model.backbone.conv2) is torch.nn.Conv2d


@pytest.mark.parametrize('branch_norm', ['batch', 'fixed', 'sampled'])
def test_fused_equals_searched(tmp_path, branch_norm):
    """In the search, when only what is on without noise counts, and behind it; in float64."""
    run = runner(tmp_path, [{**SEARCH, 'branch_norm': branch_norm}, EMA], iters=9)
    models = []
    call_at(run, lambda run: models.append(copy.deepcopy(run.model)))
    run.train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for i, model in enumerate(models):
        model = model.double()
        fused = dyrep_mm.fuse(model.eval(), x)
        assert not blocks_of(fused)
        assert_same(output_of(fused, x), output_of(model, x), i)


def test_every_file_is_a_stock_checkpoint(searched, tmp_path):
    """It loads into the plain model and fuses, whatever the search was about; its branches that are
    off have no part in it."""
    _, folder = searched
    config = write_config(tmp_path / 'config.py', [dict(SEARCH), EMA])
    x = torch.randn(4, 3, 8, 8)
    for i in (1, 4, 6, 9):
        file = folder / f'iter_{i}.pth'
        plain = TinyClassifier()
        plain.load_state_dict(load_checkpoint(file)['state_dict'], strict=True)
        fuse_checkpoint(config, file, tmp_path / 'fused.pth')  # verifies
        fused = TinyClassifier()
        fused.load_state_dict(load_checkpoint(tmp_path / 'fused.pth')['state_dict'], strict=True)
        assert_same(output_of(fused, x), output_of(plain, x), i, scale=10)


@pytest.mark.parametrize('at', [1, 2, 3, 5, 6, 8])
def test_resumed_at_any_iteration(searched, tmp_path, at):
    """In each phase and where they end: weights, alphas, noise, both optimizers and the average."""
    whole, folder = searched
    run = runner(
        tmp_path,
        [dict(SEARCH), EMA],
        iters=9,
        load_from=str(folder / f'iter_{at}.pth'),
        resume=True,
    )
    drawn = []
    call_at(run, lambda run: drawn.append(len(on_in(run))), 'before_train_iter')
    run.train()
    assert drawn == [ON] * (9 - at)
    assert_same_run(whole, run)
    averages = [
        next(h for h in r.hooks if isinstance(h, EMAHook)).ema_model.state_dict()
        for r in (whole, run)
    ]
    assert_equal_states(*averages)


def test_the_state_of_a_search_goes_on(tmp_path):
    """Ended within the search, so that alphas, their optimizer and the noise can be compared."""
    runs = []
    for name, more in (('whole', {}), ('again', {'resume': True})):
        hook = {**SEARCH, 'fixed': 1, 'keep': 0.5}
        if more:
            more['load_from'] = str(tmp_path / 'whole/iter_4.pth')
        run = runner(tmp_path / name, [hook], iters=9, **more)
        states = []
        call_at(run, lambda run, states=states: states.append(dyrep(run).rule.state_dict()))
        run.train()
        runs.append([copy.deepcopy(state) for state in states if state is not None])
    whole, again = runs
    assert len(whole) == 7
    assert assert_equal_data(whole[-1], again[-1]) >= 6  # tensors
    assert not torch.equal(whole[-1]['alphas'], torch.zeros(BRANCHES, dtype=torch.float64))


@pytest.mark.parametrize('mode', ['resume', 'load'])
def test_dyrep_goes_on_from_the_middle_of_a_search(searched, tmp_path, mode):
    """What the search had off is gone, and the function is that of the file."""
    _, folder = searched
    file = folder / 'iter_4.pth'
    run = runner(tmp_path, [dict(FAST)], iters=9, load_from=str(file), resume=mode == 'resume')
    outputs, counts = [], []
    x = torch.randn(4, 3, 8, 8)

    def look(run):
        if not outputs:
            outputs.append(output_of(run.model, x))
            counts.append(len(branches_of(run)))

    call_at(run, look, 'before_train')
    run.train()
    plain = TinyClassifier()
    plain.load_state_dict(load_checkpoint(file)['state_dict'], strict=True)
    assert counts == [ON]
    assert_same(outputs[0], output_of(plain, x), scale=10)
    assert dyrep(run).journal[-1].grown


def test_another_search_starts_from_the_middle_of_one(searched, tmp_path):
    """The branches that were on stay in their blocks; convs become blocks of all operations."""
    _, folder = searched
    run = runner(tmp_path, [dict(SEARCH)], iters=9, load_from=str(folder / 'iter_4.pth'))
    counts = []
    call_at(
        run, lambda run: counts.append((len(branches_of(run)), len(on_in(run)))), 'before_train'
    )
    run.train()
    (count, on), *_ = counts
    assert ON <= count <= BRANCHES
    assert on == math.floor(0.34 * count)


def test_resumed_from_a_plain_checkpoint(tmp_path):
    """It becomes a search then."""
    runner(tmp_path / 'plain', iters=4).train()
    run = runner(
        tmp_path / 'run', [dict(SEARCH)], iters=9, load_from=str(tmp_path / 'plain/iter_3.pth'),
        resume=True,
    )  # fmt: skip
    run.train()
    assert len(branches_of(run)) == ON


def test_the_report_tells_of_the_search(searched):
    _, folder = searched
    run = read_run(str(folder))
    assert run.group == 'RepNAS'
    page = make_report([run]).html()
    assert 'least alpha kept' in page


def test_a_pretrained_backbone(searched, tmp_path):
    """Stage C to stage D with the structure that a search left."""
    found, folder = searched
    start = {
        'type': 'dyrep_mm.DyRepPretrained',
        'checkpoint': str(folder / 'iter_9.pth'),
        'prefix': 'backbone.',
    }
    run = runner(tmp_path, [{'type': 'dyrep_mm.DyRepHook', 'interval': None}], iters=2)
    run.model.backbone.init_cfg = start
    structures = []
    call_at(run, lambda run: structures.append(structure_of(run.model)), 'before_train')
    run.train()
    assert structures == [structure_of(found.model)]


def test_a_budget_of_cost(tmp_path):
    """No iteration costs more than the budget; the first one, whose maps nobody has seen yet,
    nothing more than plain."""
    run = runner(tmp_path, [{**SEARCH, 'keep_cost': 1.3}], iters=9)
    drawn = []
    call_at(run, lambda run: drawn.append(on_in(run)), 'before_train_iter')
    run.train()
    record = Record.from_checkpoint(load_checkpoint(tmp_path / 'iter_9.pth'))
    model = dyrep_mm.expand(TinyClassifier(), 'dbb7', scope='backbone')
    costs, plain = branch_costs(model, record.sizes), record.plain.multiply_adds
    ratios = [1 + sum(costs[path][name] for path, name in on) / plain for on in drawn]
    assert ratios[0] == 1
    assert min(ratios[1:]) > 1
    assert max(ratios) <= 1.3
    assert record.journal[-1].multiply_adds == pytest.approx(ratios[-1] * plain)
    assert len(set(map(frozenset, drawn))) > 3
    again = runner(
        tmp_path / 'again', [{**SEARCH, 'keep_cost': 1.3}], iters=9,
        load_from=str(tmp_path / 'iter_4.pth'), resume=True,
    )  # fmt: skip
    again.train()
    assert_same_run(run, again)


def test_validation_sees_what_the_file_holds(tmp_path):
    """The metric of a run with an average is that of its checkpoint in the plain model."""
    run = runner(tmp_path, [dict(SEARCH), EMA], iters=9, val=4, every=4)
    scores = []

    def note(run):
        scores.append(run.message_hub.get_scalar('val/fingerprint').current())

    call_at(run, note, 'after_val')
    run.train()
    plain = runner(tmp_path / 'plain', iters=9, val=4, load_from=str(tmp_path / 'iter_4.pth'))
    assert plain.test()['fingerprint'] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('fused', [False, True])
def test_the_scale_of_the_loss_does_not_matter(tmp_path, fused):
    """A power of two scales exactly: alphas are the same bit for bit."""
    alphas = []
    for scale in (1.0, 4096.0):
        wrapper = {
            'type': 'AmpOptimWrapper',
            'dtype': 'bfloat16',
            'loss_scale': scale,
            'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9, 'fused': fused},
        }
        hook = {**SEARCH, 'alpha_optimizer': {'type': 'SGD', 'lr': 1.0}}
        run = runner(tmp_path / str(scale), [hook], iters=9, optim_wrapper=wrapper)
        call_at(run, lambda run: alphas.append(run.iter == 4 and alphas_of(run)))
        run.train()
    first, second = (found for found in alphas if found is not False)
    assert first.any()
    assert torch.equal(first, second)


# What is refused


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'keep': 0}, 'keep must be above 0 and at most 1, got 0'),
        ({'keep': 1.1}, 'keep must be above 0 and at most 1, got 1.1'),
        ({'keep': True}, 'keep must be a finite number of at least 0, got True'),
        ({'keep_cost': 1}, 'keep_cost must be above 1, the cost of the plain model, got 1'),
        ({'keep_cost': 1.2, 'keep': 0.3}, 'keep and keep_cost are two budgets: give one of them'),
        ({'warmup': -1}, 'warmup must be an integer of at least 0, got -1'),
        ({'fixed': 0}, 'fixed must be an integer of at least 1, got 0'),
        ({'interval': 0}, 'interval must be an integer of at least 1, got 0'),
        ({'branches': ['kxk']}, 'branches must name an operation besides kxk'),
        ({'branches': 2}, 'branches must be a list of names, got 2'),
        ({'by_epoch': 1}, 'by_epoch must be True or False, got 1'),
        ({'branch_norm': 'no'}, "branch_norm must be one of batch, fixed, sampled, got 'no'"),
    ],
)
def test_options_without_a_meaning(options, sentence):
    with pytest.raises(DyRepError) as error:
        dyrep_mm.RepNASHook(**options)
    assert str(error.value).startswith(sentence)


LONG = 'warmup=2 and fixed=7 leave nothing to search: training ends after 9 iterations'
BOTH = (
    'a run has one hook that changes the structure, and this config has RepNASHook and DyRepHook: '
    'take out all but one'
)


@pytest.mark.parametrize(
    ('hooks', 'sentence'),
    [
        ([{**SEARCH, 'fixed': 7}], LONG),
        ([{**SEARCH, 'scope': 'head'}], "no conv in scope 'head' can grow: it has no conv above"),
        ([SEARCH, {'type': 'dyrep_mm.DyRepHook', 'interval': 2}], BOTH),
        ([SEARCH, SEARCH], 'a run has one RepNASHook, and this config has several'),
        ([{**SEARCH, 'by_epoch': True}], 'by_epoch=True needs a training loop that counts epochs'),
        ([{'type': SEARCH['type']}], 'warmup has no default where iterations are counted: write'),
        ([{**SEARCH, 'alpha_optimizer': {'type': 'Nope'}}], 'alpha_optimizer: '),
    ],
)
def test_runs_that_cannot_be(tmp_path, hooks, sentence):
    run = runner(tmp_path, [dict(hook) for hook in hooks], iters=9)
    with pytest.raises(DyRepError) as error:
        run.train()
    assert str(error.value).startswith(sentence)
    assert not list(tmp_path.glob('*.pth'))


def test_a_scope_that_is_frozen(tmp_path):
    run = runner(tmp_path, [dict(SEARCH)], iters=9)
    call_at(run, lambda run: run.model.backbone.requires_grad_(False), 'before_run')
    with pytest.raises(DyRepError, match='can become a block: all are frozen'):
        run.train()


def test_the_defaults_are_those_of_the_public_code(tmp_path):
    """150 epochs of which 15 warm up and 100 are fixed, a third of the branches."""
    hook = dyrep_mm.RepNASHook()
    assert (hook.budget.keep, hook.alpha_optimizer) == (
        0.34,
        {'type': 'Adam', 'lr': 1e-4, 'betas': (0.5, 0.999), 'weight_decay': 5e-4},
    )
    run = runner(tmp_path, [{'type': 'dyrep_mm.RepNASHook'}], epochs=150)

    class Stop(Exception):
        pass

    def stop(run):
        raise Stop

    call_at(run, stop, 'before_train')
    with pytest.raises(Stop):
        run.train()
    schedule = dyrep(run).schedule
    assert (schedule.warmup, schedule.end, schedule.unit) == (15, 50, 'epoch')
