"""Turn a checkpoint of a DyRep run into a plain one; installed, it is ``dyrep-fuse``."""

from dyrep_mm.cli.fuse import main

if __name__ == '__main__':
    main()
