"""Run the command line as `python -m hpcmlp`."""

import sys

from hpcmlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
