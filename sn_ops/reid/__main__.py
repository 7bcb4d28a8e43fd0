"""`python -m sn_ops.reid`: the same as the console script `sn-reid`, see `sn_ops.reid.cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":  # a worker process of a data loader imports this module too
    sys.exit(main())
