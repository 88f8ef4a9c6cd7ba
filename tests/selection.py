"""Which tests ``make test`` runs, and what it says of those that it leaves out.

It leaves out what is ``slow``, because its statement has a cheaper proof that stays:

* a test that is marked so;
* in a test of the database with two parameters or more (the kind of ledger and
  ATOMIC_REQUESTS, for example) all but some cells of the grid. As many stay as the
  longest parameter has values, so that each value of each parameter is tested;
* in a test whose parameter is the kind of ledger, or the way in which it moves
  credits, one of both. The tests of a file take turns;
* with the marker ``sample(n)`` all but *n* cells. Here, too, the tests of a file take
  turns, so that together they see all values.

Hypothesis tries fewer examples there.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: How many tests were left out, by what their markers say.
LEFT_OUT = pytest.StashKey[Counter[str]]()
#: Statements (``f33``) without a proof that is quick, by the files that test them.
UNPROVED = pytest.StashKey[dict[str, set[str]]]()

GRID = "more cells of grids whose other cells were tested"
FOLDER = Path(__file__).parent
#: What these files prove is proved on PostgreSQL.
ON_POSTGRESQL = {
    "test_at_once.py",
    "test_payers.py",
    "ledger/test_concurrency.py",
    "ledger/test_postgresql.py",
}
#: The only parameters of tests that take turns.
TURNS = [["any_ledger"], ["any_path"]]
STATEMENT = re.compile(r"f\d\d(?=_)")


hypothesis.settings.register_profile("quick", max_examples=25)


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.option.markexpr:
        hypothesis.settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file that has nothing to say about the database, if that is asked."""
    if (
        config.option.markexpr.startswith("database")
        and collection_path.match("test_*.py")
        and "mark.database" not in collection_path.read_text("utf-8")
    ):
        return True
    # Others may have an opinion.
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    turns: dict[Path, Iterator[int]] = defaultdict(count)
    for cells in _grids(items):
        axes = _axes(cells)
        sample = cells[0].get_closest_marker("sample")
        if sample is not None or list(axes) in TURNS:
            number = sample.args[0] if sample is not None else 1
            kept = _some(cells, number, next(turns[cells[0].path]))
        elif _needs_a_database(cells[0]):
            kept = diagonal(cells, list(axes.values()))
        else:
            # Cheap enough.
            continue
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


def _axes(cells: list[pytest.Function]) -> dict[str, list[int]]:
    """Return which value each cell has on each axis, the longest axis first."""
    found = {}
    for name in cells[0].callspec.params:
        # By identity: a value may be anything, and the cells share it.
        values = [id(cell.callspec.params.get(name)) for cell in cells]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        found[name] = [numbers[value] for value in values]
    axes: dict[str, list[int]] = {}
    for name, axis in sorted(found.items(), key=lambda item: -max(item[1])):
        # What another axis determines is none: one parametrize() names both.
        others = [*axes.values(), [0] * len(cells)]
        if all(
            len({*zip(other, axis, strict=True)}) > len({*other}) for other in others
        ):
            axes[name] = axis
    return axes


def _needs_a_database(cell: pytest.Function) -> bool:
    return bool(
        cell.get_closest_marker("django_db")
        or {"db", "transactional_db"} & {*cell.fixturenames}
    )


def _some(
    cells: list[pytest.Function], number: int, first: int
) -> set[pytest.Function]:
    return {
        cells[(first + place * len(cells) // number) % len(cells)]
        for place in range(number)
    }


def diagonal(
    cells: list[pytest.Function], axes: list[list[int]]
) -> set[pytest.Function]:
    """Return the cells of a line through the grid, so that each value is met."""
    lengths = [max(axis) + 1 for axis in axes]
    line = {
        # Another direction for each axis: together they meet many pairs of values.
        tuple(
            (step + turn * (step // length)) % length
            for turn, length in enumerate(lengths)
        )
        for step in range(max(lengths, default=1))
    }
    places = [tuple(axis[at] for axis in axes) for at in range(len(cells))]
    kept = {at for at, place in enumerate(places) if place in line}
    for axis in axes:
        # The grid may have gaps.
        for value in {*axis} - {axis[at] for at in kept}:
            kept.add(axis.index(value))
    return {cells[at] for at in kept}


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
        if statement not in proved and files <= collected - ON_POSTGRESQL
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
