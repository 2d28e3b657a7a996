"""Evaluate a checkpoint, plain, fused or with a structure."""

import argparse
import os

from _cli import add_common, build_runner, check_local, load_config, sentence
from mmengine.evaluator import DumpResults

from dyrep_mm.errors import DyRepError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    add_common(parser)
    parser.add_argument('--out', help='pickle file for all predictions')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    with sentence('test'):
        config = load_config(args)
        config.load_from = args.checkpoint
        check_local(args.checkpoint, config)
        if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
            raise DyRepError(f'--out must end in .pkl or .pickle, got {args.out}')
        runner = build_runner(config)
        if args.out is not None:
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        runner.test()


if __name__ == '__main__':
    main()
