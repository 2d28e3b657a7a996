"""Evaluate a checkpoint, plain, fused or with a structure."""

import argparse
import os

from _cli import add_common, build_runner, check_local, check_out, load_config, sentence
from mmengine.evaluator import DumpResults


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
        check_out(args.out, '.pkl', '.pickle')
        config = load_config(args)
        config.load_from = args.checkpoint
        check_local(args.checkpoint, config)
        runner = build_runner(config)
        if args.out is not None:
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        runner.test()


if __name__ == '__main__':
    main()
