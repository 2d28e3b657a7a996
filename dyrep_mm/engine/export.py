"""An ONNX file of a fused model, checked in onnxruntime against torch.

The TorchScript-based exporter of torch is used: it runs the modules of the OpenMMLab libraries as
they are, and needs no package besides ``onnx``. A trace can hold what is true for the traced images
alone. So every file runs on images of other values, numbers and sizes before it is written, and
what does not hold for them is not promised.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dyrep_mm.engine.converter import relative_difference
from dyrep_mm.engine.passes import first_line, own_forward, tensors_in
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.tree import modes_kept
from dyrep_mm.version import __version__

#: Largest accepted relative difference of onnxruntime, in float32, from torch in float64. A model
#: that float32 alone moves by more than a tenth of it may differ by ten times as much as that.
TOLERANCE = 1e-4

#: What onnxruntime can be asked to leave open, from the most to the least.
_OPEN = (('batch', 'size'), ('batch',), ('size',), ())

#: How much larger the images of a check are than the traced ones, pixels.
_LARGER = ((32, 64), (33, 15))


@dataclass(frozen=True)
class Part:
    """What is exported of a model.

    Attributes:
        what: It in words.
        left_out: What an application has to add, in words.
        names: Of the outputs; of several, numbers follow it.
        run: Calls it.
    """

    what: str
    left_out: str
    names: str
    run: Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class OnnxReport:
    """What :func:`export_onnx` wrote.

    Attributes:
        what: The exported part in words.
        left_out: What an application has to add, in words.
        dynamic: What is left open: ``batch``, ``size``.
        outputs: Names of the outputs.
        error: Largest relative difference from torch in float64.
    """

    what: str
    left_out: str
    dynamic: tuple[str, ...]
    outputs: list[str]
    error: float


def check_onnx() -> None:
    """Raise ``DyRepError`` if a package is missing that an ONNX file needs."""
    for name in ('onnx', 'onnxruntime'):
        try:
            import_module(name)
        except ImportError:
            raise DyRepError(
                f'an ONNX file needs {name}, which is not installed: pip install onnx onnxruntime'
            ) from None


def part_of(model: nn.Module) -> Part:
    """What can be exported of ``model`` by torch alone.

    Of a detector that is backbone and neck: heads decode and choose boxes in code that depends on
    values. Of any other model it is the output of its own forward.
    """
    kinds = {f'{base.__module__.split(".")[0]}.{base.__name__}' for base in type(model).__mro__}
    if 'mmdet.BaseDetector' in kinds:
        has_neck = getattr(model, 'with_neck', hasattr(model, 'neck'))
        body = ('backbone', 'neck', 'data_preprocessor')
        heads = [name for name, _ in model.named_children() if name not in body]
        return Part(
            f'{"backbone and neck" if has_neck else "backbone"} of {type(model).__name__}',
            f'{", ".join(heads)} and the choice of boxes, which mmdeploy exports',
            'features',
            lambda model, images: cast(Any, model).extract_feat(images),
        )
    if 'mmseg.BaseSegmentor' in kinds:
        left_out = 'resizing to the image, and the largest logit'
        return Part(f'logits of {type(model).__name__}', left_out, 'logits', own_forward)
    if 'mmpretrain.BaseClassifier' in kinds and getattr(model, 'with_head', False):
        return Part(f'logits of {type(model).__name__}', 'softmax', 'logits', own_forward)
    return Part(f'forward of {type(model).__name__}', 'nothing', 'output', own_forward)


@dataclass(frozen=True)
class _Case:
    """Images, and what torch makes of them."""

    images: Tensor
    exact: list[Tensor]  # in float64
    error: float  # of torch in float32

    @property
    def shape(self) -> str:
        return 'x'.join(map(str, self.images.shape))


class PoolingByProducts(TorchFunctionMode):
    """Writes adaptive average pooling as two matrix products where ONNX has no operator for it:
    where the map cannot be cut into equal parts. The products are made for one size of the map."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is not F.adaptive_avg_pool2d:
            return result
        x = args[0] if args else kwargs['input']
        sizes = [(int(n), int(m)) for n, m in zip(x.shape[-2:], result.shape[-2:], strict=True)]
        if all(n % m == 0 for n, m in sizes):
            return result
        rows, columns = (_bins(*size).to(x) for size in sizes)
        return rows @ x @ columns.T


def _bins(n: int, bins: int) -> Tensor:
    """The matrix (bins, n) with which torch averages ``n`` places to ``bins`` overlapping ones."""
    matrix = torch.zeros(bins, n, dtype=torch.float64)
    for i in range(bins):
        start, end = i * n // bins, -(-(i + 1) * n // bins)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


class _Whole(nn.Module):
    """A part of a model as a module with tensors as outputs."""

    def __init__(self, model: nn.Module, part: Part):
        super().__init__()
        self.model, self.part = model, part

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.part.run(self.model, images)))


def export_onnx(
    model: nn.Module,
    images: Tensor,
    out: str | Path,
    *,
    about: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> OnnxReport:
    """Write an ONNX file of a plain model, see :func:`part_of`; number and size of images are left
    open where the model allows.

    Args:
        model: Plain, in float32, on the CPU. It is called in eval mode.
        images: Images (n, c, h, w) that it takes. The file takes their size, if one alone.
        out: The file to write.
        about: More for the metadata of the file, under ``dyrep_mm.NAME``.
        say: Is told what is exported, and what is fixed.

    Raises:
        DyRepError: a package is missing, torch or onnxruntime cannot do it, or the results differ.
    """
    check_onnx()
    part = part_of(model)
    whole = _Whole(model, part)
    with modes_kept(whole), torch.no_grad(), _quiet():
        whole.eval()
        made = _make(whole, images.float(), say)
    report = OnnxReport(part.what, part.left_out, *made[1:])
    _write(made[0], report, about or {}, out)
    open_part = ' and '.join(report.dynamic) or 'nothing'
    say(
        f'wrote {out}: {report.what}, {open_part} left open; left out: {report.left_out}; '
        f'onnxruntime differs by {report.error:.1e}'
    )
    return report


def _make(
    whole: _Whole, images: Tensor, say: Callable[[str], None]
) -> tuple[bytes, tuple[str, ...], list[str], float]:
    """The graph that leaves most open of those that pass their check: its bytes, what is open,
    the names of its outputs, and its error."""
    exact = copy.deepcopy(whole).double()
    height, width = images.shape[-2:]

    def case(number: int, height: int, width: int) -> _Case:
        shape = (number, images.shape[1], height, width)
        # Other values than those of the trace.
        x = torch.randn(shape, generator=torch.Generator().manual_seed(number + 1))
        truth = [tensor.clone() for tensor in exact(x.double())]
        return _Case(x, truth, relative_difference(whole(x), truth))

    one = case(1, height, width)
    if not one.exact:
        raise DyRepError(f'no tensor comes out of the {whole.part.what}')
    more = []
    for rows, columns in _LARGER:
        try:
            more.append(case(1, height + rows, width + columns))
        except Exception:  # of any code, on a size that it may not be made for
            continue
    cases = {'batch': [case(3, height, width)], 'size': more}
    trouble: dict[str, str] = {}
    for names in _OPEN:
        if 'size' in names and not more:
            continue
        checks = [one, *(case for name in names for case in cases[name])]
        try:
            graph, outputs = _traced(whole, images[:2] if 'batch' in names else images[:1], checks)
            error = _largest_error(graph, checks)
        except Exception as problem:  # of torch or of onnxruntime
            is_ours = isinstance(problem, DyRepError)
            text = str(problem) if is_ours else first_line(problem)
            trouble.update(dict.fromkeys(names or ('nothing',), text.split('. ')[0][:200]))
            continue
        fixed = f'the size of images is fixed at {height}x{width}'
        if not more:
            say(f'{fixed}: the model takes no other')
        elif 'size' not in names:
            say(f'{fixed}, --size gives another: {trouble["size"]}')
        if 'batch' not in names:
            say(f'the number of images is fixed at 1: {trouble["batch"]}')
        return graph, names, outputs, error
    raise DyRepError(
        f'{whole.part.what} cannot be exported to ONNX without mmdeploy, if at all: '
        + trouble['nothing']
    )


def _traced(whole: _Whole, images: Tensor, checks: list[_Case]) -> tuple[bytes, list[str]]:
    """The graph as bytes, with the dimensions open that differ between ``images`` and ``checks``;
    and the names of its outputs."""
    result = whole(images)
    prefix = whole.part.names
    outputs = [f'{prefix}_{i}' for i in range(len(result))] if result[1:] else [prefix]
    axes = {}
    named = zip(['images', *outputs], [images, *result], strict=True)
    for i, (name, tensor) in enumerate(named):
        seen = [case.images if i == 0 else case.exact[i - 1] for case in checks]
        words = {0: 'batch'} if len(tensor) == len(images) else {}
        words |= {2: 'height', 3: 'width'} if i == 0 else {}
        axes[name] = {
            axis: words.get(axis, f'{name}_{axis}')
            for axis in range(tensor.ndim)
            if any(other.shape[axis] != tensor.shape[axis] for other in seen)
        }
    # Later versions of torch choose another exporter by themselves.
    chosen: dict[str, Any] = (
        {'dynamo': False} if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}
    )
    file: Any = io.BytesIO()  # takes one, says less
    with PoolingByProducts():
        torch.onnx.export(
            whole,
            (images,),
            file,
            input_names=['images'],
            output_names=outputs,
            dynamic_axes=axes,
            **chosen,
        )
    return file.getvalue(), outputs


def _largest_error(graph: bytes, checks: list[_Case]) -> float:
    """Of onnxruntime on all ``checks``.

    Raises:
        DyRepError: a result has another shape, or differs by more than float32 explains.
    """
    runtime = import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and told from here
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    errors = []
    for case in checks:
        result = session.run(None, {'images': case.images.numpy()})
        got = [torch.from_numpy(array) for array in result]
        if [tensor.shape for tensor in got] != [tensor.shape for tensor in case.exact]:
            raise DyRepError(f'onnxruntime gives another shape on images of {case.shape}')
        errors.append(relative_difference(got, case.exact))
        if not errors[-1] <= max(TOLERANCE, 10 * case.error):
            raise DyRepError(
                f'onnxruntime differs by {errors[-1]:.1e} on images of {case.shape}, '
                f'torch in float32 by {case.error:.1e}'
            )
    return max(errors)


def _write(graph: bytes, report: OnnxReport, about: Mapping[str, str], out: str | Path) -> None:
    """Write the file with its metadata, whole or not at all."""
    onnx = import_module('onnx')
    content = onnx.load_model_from_string(graph)
    said = {
        'exported': report.what,
        'left_out': report.left_out,
        'dynamic': ', '.join(report.dynamic),
        'version': __version__,
        **about,
    }
    onnx.helper.set_model_props(content, {f'dyrep_mm.{name}': text for name, text in said.items()})
    content.doc_string = f'{report.what}; left out: {report.left_out}'
    partial = Path(f'{out}.partial')
    try:
        partial.write_bytes(content.SerializeToString())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a trace: the check says what is wrong."""
    # torch prints the whole graph of an export that fails, whatever it is told.
    printing = hasattr(torch._C, '_jit_onnx_log')
    silence = (
        patch.object(torch._C, '_jit_onnx_log', lambda *_: None) if printing else nullcontext()
    )
    with warnings.catch_warnings(), silence:
        warnings.simplefilter('ignore')
        yield
