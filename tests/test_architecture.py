"""The one direction of imports, and that the core needs torch alone."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dyrep_mm

PACKAGE = Path(dyrep_mm.__file__).parent

#: A file may use what stands to its left.
ORDER = [
    *('version', 'errors', 'transforms', 'geometry', 'moments', 'branches', 'block', 'surgery'),
    *('calibration', 'saliency', 'evolution', 'optim'),
    *('checkpoint', 'runtime', 'registry', 'backbones', 'converter', 'initialize', 'hook'),
]
CORE = ORDER[: ORDER.index('checkpoint')]

MODULES = sorted(path.stem for path in PACKAGE.glob('*.py') if path.stem != '__init__')


def imports_of(module, everywhere=True):
    """Dotted names that a module of the package imports."""
    tree = ast.parse((PACKAGE / f'{module}.py').read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module}: relative import'
            yield node.module
            if node.module == 'dyrep_mm':
                yield from (f'dyrep_mm.{alias.name}' for alias in node.names)


def own(module, everywhere=True):
    """Modules of the package that a module of the package imports."""
    names = (name.split('.') for name in imports_of(module, everywhere))
    return {parts[1] for parts in names if parts[0] == 'dyrep_mm' and len(parts) > 1}


def test_every_module_has_a_place():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_to_the_left(module):
    left = ORDER[: ORDER.index(module)]
    assert own(module) <= set(left)


@pytest.mark.parametrize('module', CORE)
def test_the_core_imports_torch_alone(module):
    outside = {name.partition('.')[0] for name in imports_of(module)} - {'dyrep_mm'}
    assert outside - set(sys.stdlib_module_names) <= {'torch'}


def test_the_package_imports_the_core_alone():
    assert own('__init__', everywhere=False) <= set(CORE)


def test_public_names():
    assert set(dyrep_mm.__all__) >= {'grow', 'prune', 'expand', 'structure_of', 'fuse', 'DyRepHook'}
    for name in set(dyrep_mm.__all__) - {'DyRepHook'}:
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
        from dyrep_mm import calibration, evolution, optim, saliency

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
    command = [sys.executable, '-c', textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
