"""Multiply-adds and parameters of a config, plain, as trained and fused: ``dyrep-flops CONFIG``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.structures import BaseDataElement
from prettytable import PrettyTable
from torch import nn

from dyrep_mm.cli.common import sentence
from dyrep_mm.engine.checkpoint import load_checkpoint, load_structure, structure_in, weights_of
from dyrep_mm.engine.converter import (
    IMAGE_SIZE,
    build_model,
    check_size,
    find_passes,
    names_dyrep,
    read_config,
    sizes_in,
)
from dyrep_mm.engine.passes import first_line, image_channels, own_forward
from dyrep_mm.engine.stock import from_stock
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.cost import Cost, Sizes, SizeWatch, cost_of
from dyrep_mm.surgery.fuse import fuse
from dyrep_mm.surgery.rewire import expand, restore
from dyrep_mm.surgery.structure import PRESETS

#: What a two-stage detector counts depends on how many regions its random weights propose.
SEED = 0


@dataclass(frozen=True)
class Costs:
    """What the model of a config costs, for one image.

    Attributes:
        plain: Without DyRep.
        trained: With its structure, every conv of every branch by itself; None where it has none.
        fused: After it, with the biases that convs gain; None as well.
        average: Of the training that wrote the checkpoint; None where it is not known.
    """

    plain: Cost
    trained: Cost | None = None
    fused: Cost | None = None
    average: Cost | None = None


def costs_of(
    config: Config,
    checkpoint: str | None = None,
    *,
    structure: str | Mapping | None = None,
    shape: tuple[int, int] | None = None,
    trust: bool = False,
) -> Costs:
    """Count the model of a config in its three forms.

    The sizes of the maps are those of one forward of the plain model, heads included, so the three
    differ in their convs alone. The structure is that of the checkpoint, else ``structure``, else
    what the hook of the config starts with.

    Args:
        config: With or without a hook.
        checkpoint: File of a run with DyRep.
        structure: ``'dbb'``, ``'dbb7'``, ``'repvgg'``, a Structure, or a file with one.
        shape: Height and width of the image, pixels; by default :func:`shape_in` the config.
        trust: Load a checkpoint that holds more than plain data.

    Raises:
        DyRepError: an argument is wrong, or the model does not take such an image.
    """
    shape = shape or shape_in(config)
    hook = next((hook for hook in _hooks(config) if names_dyrep(hook.get('type'))), {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        plain = build_model(config)
        sizes = sizes_seen(plain, shape)
    average, trained = None, copy.deepcopy(plain)
    if checkpoint is not None:
        loaded = from_stock(load_checkpoint(checkpoint, trust=trust))
        found = structure_in(loaded)
        restore(trained, found or {}, weights_of(loaded))
        record = Record.from_checkpoint(loaded)
        if (parameters := record.average('parameters')) is not None:
            average = Cost(round(parameters), record.average('multiply_adds'))
        grown = bool(found)
    else:
        start = structure or hook.get('structure')
        if isinstance(start, str) and start in PRESETS:
            expand(trained, start, scope=hook.get('scope', 'backbone'))
        elif start is not None:
            expand(trained, load_structure(start))
        grown = start is not None
    if not grown:
        return Costs(cost_of(plain, sizes), average=average)
    fused = _fused(trained, plain, config)
    return Costs(cost_of(plain, sizes), cost_of(trained, sizes), cost_of(fused, sizes), average)


def _hooks(config: Config) -> list[Mapping]:
    hooks = [*config.get('default_hooks', {}).values(), *(config.get('custom_hooks') or [])]
    return [hook for hook in hooks if hook]


def _fused(trained: nn.Module, plain: nn.Module, config: Config) -> nn.Module:
    """``trained`` as ``tools/fuse.py`` makes it plain, on small images."""
    exact = copy.deepcopy(trained).double()
    inputs, passes = find_passes(exact, plain, [IMAGE_SIZE, *sizes_in(config)])
    return fuse(exact, inputs, forward=passes)


def shape_in(config: Config) -> tuple[int, int]:
    """Height and width of the images that a config works with, pixels: those that its data
    preprocessor makes, else its test pipeline, else its training pipeline.

    Raises:
        DyRepError: the config names none.
    """
    said = config.model.get('data_preprocessor') or {}
    if said.get('size'):
        return check_size(said['size'])
    for part in ('test', 'val', 'train'):
        data: Any = config.get(f'{part}_dataloader') or {}
        while 'dataset' in data and 'pipeline' not in data:
            data = data['dataset']
        for transform in reversed(data.get('pipeline') or []):
            if size := transform.get('crop_size'):
                return check_size(size)
            if scale := transform.get('scale'):  # width first
                pair = (scale, scale) if isinstance(scale, int) else tuple(scale)
                if all(type(n) is int for n in pair):
                    return check_size(pair[::-1])
    raise DyRepError(
        f'{config.filename} says no size of images: --shape gives the height and width'
    )


@torch.no_grad()
def sizes_seen(model: nn.Module, shape: tuple[int, int]) -> Sizes:
    """The sizes of the maps that the layers of ``model``, in eval mode, see of one image.

    A model of OpenMMLab runs in mode ``'tensor'``, with its heads; a two-stage detector finds its
    regions itself.

    Args:
        model: Without blocks.
        shape: Height and width of the image, pixels, before the data preprocessor pads it.
    """
    image = torch.randint(256, (image_channels(model, shape), *shape), dtype=torch.uint8)
    about = {'ori_shape': shape, 'img_shape': shape, 'pad_shape': shape, 'batch_input_shape': shape}
    sample = BaseDataElement(metainfo={**about, 'scale_factor': (1.0, 1.0)})

    def as_in_a_test() -> None:
        preprocess: Any = model.data_preprocessor
        data = preprocess({'inputs': [image], 'data_samples': [sample]}, False)
        model(data['inputs'], data['data_samples'], mode='tensor')

    trouble = ''
    for run in (as_in_a_test, lambda: own_forward(model, image[None].float())):
        watch = SizeWatch(model)
        try:
            run()
        except Exception as error:  # of any model
            trouble = trouble or first_line(error)
        else:
            return watch.finish()
        watch.finish()
    raise DyRepError(
        f'{type(model).__name__} does not run on an image of {shape[0]}x{shape[1]}: {trouble}'
    )


def table_of(costs: Costs) -> PrettyTable:
    """The costs, to be read."""
    table = PrettyTable(['model', 'parameters (M)', 'multiply-adds (G)', 'of plain'])
    table.align = 'r'
    table.align['model'] = 'l'
    rows = {
        'plain': costs.plain,
        'as trained': costs.trained,
        'average of the training': costs.average,
        'fused': costs.fused,
    }
    for name, cost in rows.items():
        if cost is not None:
            macs, of_plain = '-', '-'
            if cost.multiply_adds is not None and costs.plain.multiply_adds:
                macs = f'{cost.multiply_adds / 1e9:.3f}'
                of_plain = f'{cost.multiply_adds / costs.plain.multiply_adds:.3f}'
            table.add_row([name, f'{cost.parameters / 1e6:.3f}', macs, of_plain])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint of a run with DyRep, whose structure is counted'
    )
    parser.add_argument(
        '--structure',
        help=f'{", ".join(PRESETS)}, or a file with a structure; by default what the hook of the '
        'config starts with',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        help='height and width of the image, or one number for both; default: what the config says',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config'
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='load a checkpoint that holds more than plain data; such a file can run code',
    )
    args = parser.parse_args()
    with sentence('get_flops'):
        if args.checkpoint is not None and args.structure is not None:
            raise DyRepError('a checkpoint has its structure: --structure is for a config alone')
        shape = None if args.shape is None else check_size(args.shape)
        config = read_config(args.config)
        config.merge_from_dict(args.cfg_options or {})
        costs = costs_of(
            config, args.checkpoint, structure=args.structure, shape=shape, trust=args.trust
        )
        height, width = shape or shape_in(config)
        print(f'one image of {height}x{width}, convs and linear layers alone:')
        print(table_of(costs))
        if costs.trained is None:
            print('no structure: a checkpoint or --structure has one')
