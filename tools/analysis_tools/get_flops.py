"""Count multiply-adds and parameters of a config; installed, it is ``dyrep-flops``."""

from dyrep_mm.cli.flops import main

if __name__ == '__main__':
    main()
