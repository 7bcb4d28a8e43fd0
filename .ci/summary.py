"""The end of .ci/run: every step and why pytest skipped, what was slowest, and the counts in the last line.

    python .ci/summary.py RESULTS PYTEST.xml SECONDS

RESULTS has a line a step: passed, failed or skipped; seconds; name; reason (steps.sh writes it). PYTEST.xml is the
report of the suite, SECONDS what the whole run took. The exit status is 1 when a step failed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

SLOWEST = 10


class Step(NamedTuple):
    result: str
    seconds: int
    name: str
    reason: str


class Tests(NamedTuple):
    """Counts of the suite, reasons of its skips, seconds of each test."""

    total: int
    failed: int
    skips: Counter[str]
    seconds: dict[str, float]


def read_steps(path: Path) -> list[Step]:
    fields = [line.split("\t") for line in path.read_text().splitlines()]
    return [Step(result, int(seconds), name, reason) for result, seconds, name, reason in fields]


def read_tests(path: Path) -> Tests:
    """Of a report in JUnit's format; nothing where there is none."""
    tests = Tests(0, 0, Counter(), {})
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except OSError:
        print("no pytest report was written")
        return tests
    for suite in suites:
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        tests = tests._replace(total=tests.total + int(suite.get("tests", 0)), failed=tests.failed + bad)
        tests.skips.update(skip.get("message", "no reason given") for skip in suite.iter("skipped"))
        tests.seconds.update(
            (f"{case.get('classname')}::{case.get('name')}", float(case.get("time", 0)))
            for case in suite.iter("testcase")
        )
    return tests


def main(results: str, report: str, seconds: str) -> int:
    steps, tests = read_steps(Path(results)), read_tests(Path(report))
    counts = Counter(step.result for step in steps)
    skipped = sum(tests.skips.values())

    print("\n==== slowest steps")
    for step in sorted(steps, key=lambda step: -step.seconds)[:SLOWEST]:
        print(f"{step.seconds:6} s  {step.name}")
    print("\n==== slowest tests")
    for name, took in sorted(tests.seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
        print(f"{took:6.1f} s  {name}")

    print("\n==== summary")
    for result, word in (("passed", "passed  "), ("skipped", "SKIPPED "), ("failed", "FAILED  ")):
        for step in steps:
            if step.result == result:
                print(word, f"{step.name}: {step.reason}" if step.reason else step.name)
    for reason, count in sorted(tests.skips.items()):
        print(f"SKIPPED  {count} of pytest's tests: {reason}")
    print(f"{int(seconds) // 60} min {int(seconds) % 60} s in all")
    print(
        f"steps: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; "
        f"the next line adds pytest's {tests.total} tests"
    )
    passed = tests.total - tests.failed - skipped + counts["passed"]
    print(f"{passed} passed, {tests.failed + counts['failed']} failed, {skipped + counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
