"""Show runs as one page; installed, it is ``dyrep-report``."""

from dyrep_mm.cli.report import main

if __name__ == '__main__':
    main()
