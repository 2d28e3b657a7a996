"""Train a config of mmdet, mmseg or mmpretrain, with or without DyRep."""

import argparse
import os

from _cli import add_common, build_runner, check_local, load_config, sentence
from mmengine.config import Config

from dyrep_mm.engine.checkpoint import latest_checkpoint
from dyrep_mm.errors import DyRepError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    add_common(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the lr with the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a value the latest of the work dir',
    )
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def configure(args: argparse.Namespace) -> Config:
    config = load_config(args)
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in config.get('auto_scale_lr', {}):
            raise DyRepError(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size, {args.config} has none'
            )
        config.auto_scale_lr.enable = True
    if args.resume is not None:
        config.resume = True
        config.load_from = None if args.resume == 'auto' else args.resume
    if config.get('resume') and config.get('load_from') is None:
        config.load_from = latest_checkpoint(config.work_dir)
        config.resume = config.load_from is not None
    check_local(config.get('load_from'), config)
    return config


def main() -> None:
    args = parse_args()
    with sentence('train'):
        build_runner(configure(args)).train()


if __name__ == '__main__':
    main()
