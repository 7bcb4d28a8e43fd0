"""How fast is it on this GPU? One command, a few minutes, no network; run `prove.py` first.

    python benchmarks/gpu/measure.py OUT

To publish it: OUT/measure.json becomes benchmarks/results/<device>/<date>-<commit>-measure.json, then
`python benchmarks/gpu/page.py`.
"""

from __future__ import annotations

import sys

import runner

if __name__ == "__main__":
    sys.exit(runner.main("measure", str(__doc__)))
