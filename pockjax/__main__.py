"""`python -m pockjax` is `pockjax`."""

import sys

from pockjax.cli import main

if __name__ == "__main__":  # not in the child processes, which import this module too
    sys.exit(main())
