"""How fast is it on this GPU? One command, a few minutes, no network; run `prove.py` first.

    python benchmarks/gpu/measure.py OUT

Copy OUT/measure.json to benchmarks/results/<device>/ and run `python benchmarks/gpu/page.py` to publish it.
"""

from __future__ import annotations

import sys

import runner

if __name__ == "__main__":
    sys.exit(runner.main("measure", str(__doc__)))
