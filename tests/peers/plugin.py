"""What `run.py` adds to pytest: leaves out the tests that do not apply, and counts outcomes by suite and file."""

import fnmatch
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from not_applicable import NOT_APPLICABLE


SUITE = os.environ["PEERS_SUITE"]
counts: dict[str, Counter] = defaultdict(Counter)


def part_of(nodeid: str) -> str:
    """The line of the table that a test is counted in: suite and adapter."""
    return f"{SUITE}: {Path(nodeid.split('::')[0]).stem.removeprefix('peer_')}"


def pytest_collection_modifyitems(config, items):
    entries = NOT_APPLICABLE.get(SUITE, {})
    unused, kept, left_out = set(entries), [], []
    for item in items:
        name = item.nodeid.rpartition("/")[2]
        matching = [pattern for pattern in entries if fnmatch.fnmatchcase(name, pattern)]
        unused -= set(matching)
        (left_out if matching else kept).append(item)
        if matching:
            counts[part_of(item.nodeid)]["not applicable"] += 1
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"not_applicable.py names tests of {SUITE} that are not there: {sorted(unused)}")
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_runtest_logreport(report):
    part = part_of(report.nodeid)
    if report.skipped:
        counts[part]["left out by themselves"] += 1
    elif report.failed:
        counts[part]["failed"] += 1
    elif report.when == "call":
        counts[part]["passed"] += 1


def pytest_sessionfinish(session):
    outcomes = ("passed", "not applicable", "left out by themselves", "failed")
    table = {part: {outcome: found[outcome] for outcome in outcomes} for part, found in sorted(counts.items())}
    Path(os.environ["PEERS_REPORT"]).write_text(json.dumps(table))
