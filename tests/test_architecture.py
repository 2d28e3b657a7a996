"""The map of the code: which room may use which, held against the imports."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dyrep_mm

PACKAGE = Path(dyrep_mm.__file__).parent

#: A file may use what stands before it: earlier folders, and earlier files of its own.
MAP = {
    '': ['version', 'errors'],
    'reparam': ['kernels', 'geometry', 'norms', 'moments', 'branches', 'block'],
    'surgery': [
        *('tree', 'structure', 'copies', 'candidates', 'usage', 'rewire', 'calibration'),
        *('optimizer', 'outputs', 'fuse', 'cost', 'charge', 'quantization', 'gates'),
    ],
    'evolution': [
        'operations',
        'saliency',
        'metrics',
        'gain',
        'budget',
        'rule',
        'record',
        'search',
    ],
    # For mmengine, which looks for `registry` at the top.
    'mmengine': ['registry', 'backbones', 'datasets'],
    'engine': [
        *('stock', 'checkpoint', 'runner', 'batches', 'progress', 'transaction', 'pretrained'),
        *('start', 'options', 'losses', 'schedule', 'times', 'channels', 'base', 'hook', 'repnas'),
        *('passes', 'converter', 'export'),
    ],
    'report': [
        *('words', 'history', 'logs', 'data', 'drawing', 'evolution', 'blocks', 'story'),
        *('compare', 'study', 'page'),
    ],
    'cli': ['common', 'fuse', 'report', 'flops'],
}
ORDER = [
    f'{folder}.{file}' if folder not in ('', 'mmengine') else file
    for folder, files in MAP.items()
    for file in files
]
#: What needs torch alone.
CORE = [name for name in ORDER if name.partition('.')[0] in ('version', 'errors', *list(MAP)[1:4])]

#: Files short of a page are for these alone; a folder is no place for fragments.
SHORT = {'errors', 'version', 'registry'}


def file_of(module):
    return PACKAGE / f'{module.replace(".", "/")}.py'


MODULES = sorted(
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    for path in PACKAGE.rglob('*.py')
    if path.stem != '__init__' and 'configs' not in path.relative_to(PACKAGE).parts  # they are data
)


def imports_of(path, everywhere=True):
    """Dotted names that a file of the package imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def own(path, everywhere=True):
    """Modules of the package that a file of the package imports."""
    names = {name.removeprefix('dyrep_mm.') for name in imports_of(path, everywhere)}
    return names & set(ORDER)


def test_every_file_has_a_place():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize('folder', ['reparam', 'surgery', 'evolution', 'engine', 'report', 'cli'])
def test_contributing_shows_this_map(folder):
    lines = (PACKAGE.parent / 'CONTRIBUTING.md').read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f'| `dyrep_mm/{folder}/` |'))
    assert row.split('|')[-2].split() == [f'`{file}`' for file in MAP[folder]]


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_to_what_stands_before(module):
    assert own(file_of(module)) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize('module', MODULES)
def test_no_file_is_a_fragment(module):
    assert module in SHORT or len(file_of(module).read_text().splitlines()) >= 40


@pytest.mark.parametrize('module', CORE)
def test_the_core_imports_torch_alone(module):
    outside = {name.partition('.')[0] for name in imports_of(file_of(module))} - {'dyrep_mm'}
    assert outside - set(sys.stdlib_module_names) <= {'torch'}


@pytest.mark.parametrize('folder', [*list(MAP)[1:4], 'engine', 'report', 'cli'])
def test_folders_import_nothing_by_themselves(folder):
    assert not list(imports_of(PACKAGE / folder / '__init__.py'))


def test_the_package_imports_the_core_alone():
    assert own(PACKAGE / '__init__.py', everywhere=False) <= set(CORE)


def test_public_names():
    functions = {'grow', 'prune', 'expand', 'structure_of', 'fuse'}
    classes = {'DyRepHook', 'DyRepPretrained', 'DyRepConverter', 'PlainVGG', 'ImagesInMemory'}
    assert set(dyrep_mm.__all__) >= functions | classes
    for name in dyrep_mm.__all__:
        assert getattr(dyrep_mm, name)
    with pytest.raises(AttributeError, match='nope'):
        dyrep_mm.nope  # noqa: B018


def test_it_works_without_openmmlab():
    """In a process of its own, in which nothing of OpenMMLab can be imported."""
    script = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'):
                    raise ModuleNotFoundError(f'{name} is blocked', name=name)

        sys.meta_path.insert(0, Blocker())
        import torch
        import dyrep_mm
        from importlib import import_module

        for module in sys.argv[1:]:
            import_module(f'dyrep_mm.{module}')

        torch.set_num_threads(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            before = model(x)
            dyrep_mm.grow(model, '0')
            dyrep_mm.prune(model, '0', ['1x1'])
            assert dyrep_mm.structure_of(model)
            fused = dyrep_mm.fuse(model, x)
            assert type(fused[0]) is torch.nn.Conv2d
            for other in (model, fused):
                assert torch.allclose(other(x), before, atol=1e-5)
        try:
            dyrep_mm.DyRepHook
        except ModuleNotFoundError as error:
            assert 'mm' in str(error)
        else:
            raise AssertionError('the hook came without mmengine')
        assert not [name for name in sys.modules if name.startswith(('mmengine', 'mmcv'))]
    """
    command = [sys.executable, '-c', textwrap.dedent(script), *CORE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
