"""Turn a checkpoint of a DyRep run into a plain one: ``tools/fuse.py CONFIG CHECKPOINT OUT``."""

import argparse

from _cli import sentence

from dyrep_mm.engine.converter import IMAGE_SIZE, TOLERANCE, fuse_checkpoint
from dyrep_mm.engine.progress import stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the run; its plain config does too')
    parser.add_argument('checkpoint', help='checkpoint of the run')
    parser.add_argument('out', help='file to write; only if the fused model is verified')
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        help='height and width of the verification images, or one number for both; '
        f'default: {IMAGE_SIZE}, or what the config says of a model that does not take it',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=TOLERANCE,
        help='largest relative difference of outputs in float64',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='load a checkpoint that holds more than plain data; such a file can run code',
    )
    args = parser.parse_args()
    with sentence('fuse'), stages('fusing', total=5):
        fuse_checkpoint(
            args.config,
            args.checkpoint,
            args.out,
            size=args.size,
            tolerance=args.tolerance,
            trust=args.trust,
            say=print,
        )


if __name__ == '__main__':
    main()
