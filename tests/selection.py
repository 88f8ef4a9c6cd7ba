"""Which tests ``make test`` runs, and what it says of those that it leaves out.

It leaves out what is ``slow``, because its statement has a cheaper proof that stays:

* a test that is marked so;
* in a test with two parameters or more (the kind of ledger and ATOMIC_REQUESTS, for
  example) every other cell of the grid, as on a chessboard. With three parameters
  most pairs of their values remain;
* with the marker ``sample(n)`` all but *n* cells. Each test of a file begins with
  another cell, so that together they see all values.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

#: How many tests were left out, by what their markers say.
LEFT_OUT = pytest.StashKey[Counter[str]]()
#: Statements (``f33``) without a proof that is quick, by the files that test them.
UNPROVED = pytest.StashKey[dict[str, set[str]]]()

GRID = "more cells of grids whose other cells were tested"
FOLDER = Path(__file__).parent
#: Where there is no PostgreSQL, nobody collects these.
ON_POSTGRESQL = {"test_at_once.py", "ledger/test_postgresql.py"}
STATEMENT = re.compile(r"f\d\d(?=_)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    offsets: dict[Path, Iterable[int]] = defaultdict(count)
    for cells in _grids(items):
        sample = cells[0].get_closest_marker("sample")
        if sample is None:
            kept = {cell for cell in cells if _colour(cell, cells) == 0}
        else:
            (number,) = sample.args
            first = next(offsets[cells[0].path])
            kept = {
                cells[(first + place * len(cells) // number) % len(cells)]
                for place in range(number)
            }
        for cell in {*cells} - kept:
            cell.add_marker(pytest.mark.slow(GRID))
    config.stash[LEFT_OUT] = Counter()
    config.stash[UNPROVED] = _unproved(items)


def _grids(items: Iterable[pytest.Item]) -> Iterable[list[pytest.Function]]:
    """Return the cells of each test with parameters that are not slow already."""
    grids: dict[Any, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.get_closest_marker("slow") is None
        ):
            grids[item.parent, item.originalname].append(item)
    return grids.values()


def _colour(cell: pytest.Function, cells: list[pytest.Function]) -> int:
    """Return 0 for a white cell of the chessboard, and 1 for a black one."""
    # Names that one parametrize() gives values to share an axis.
    axes = {
        tuple(other.callspec.indices.get(name, 0) for other in cells)
        for name in cell.callspec.indices
    }
    axes = [axis for axis in axes if len({*axis}) > 1]
    if len(axes) < 2:
        return 0
    at = cells.index(cell)
    return sum(sorted({*axis}).index(axis[at]) for axis in axes) % 2


def _unproved(items: Iterable[pytest.Item]) -> dict[str, set[str]]:
    collected = {str(item.path.relative_to(FOLDER)) for item in items}
    tested: dict[str, set[str]] = defaultdict(set)
    for file in FOLDER.rglob("test_*.py"):
        for names in re.findall(r"def test_((?:f\d\d_)+)", file.read_text("utf-8")):
            for statement in STATEMENT.findall(names):
                tested[statement].add(str(file.relative_to(FOLDER)))
    proved = {
        statement
        for item in items
        if item.get_closest_marker("slow") is None
        for statement in STATEMENT.findall(item.name.partition("[")[0])
    }
    return {
        statement: files
        for statement, files in sorted(tested.items())
        # What was not asked for may have the proof.
        if statement not in proved and files <= collected | ON_POSTGRESQL
    }


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("slow")
        chosen = item.config.option.markexpr
        if "database" in chosen and item.get_closest_marker("database") is None:
            continue
        if marker is not None and "not slow" in chosen:
            item.config.stash[LEFT_OUT][marker.args[0]] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(config.stash.get(LEFT_OUT, {}))
    # The files that were asked for may be all about other things than a database.
    nothing = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and "database" in config.option.markexpr:
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    # Each of pytest-xdist's workers has collected all tests.
    left_out = getattr(node, "workeroutput", {}).get("left_out", {})
    node.config.stash[LEFT_OUT] = Counter(left_out)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left_out = config.stash.get(LEFT_OUT, None)
    if left_out:
        terminalreporter.section("left out (make test-all runs them, too)")
        for what, number in left_out.most_common():
            terminalreporter.line(f"{number:5} {what}")
