"""Is it right on this GPU? One command, a few minutes, no network, no compiler.

    python benchmarks/gpu/prove.py OUT

From a checkout with built libraries (`prepare.sh`, or `pip install -e .`), or with an installed sn_ops. Ends with
status 0 if every step passed.
"""

from __future__ import annotations

import sys

import runner

if __name__ == "__main__":
    sys.exit(runner.main("prove", str(__doc__)))
