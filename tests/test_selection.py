"""What ``make test`` leaves out has another proof there."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from tests.selection import UNPROVED, diagonal

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_every_statement_has_a_proof_that_is_not_slow(
    pytestconfig: pytest.Config,
) -> None:
    assert pytestconfig.stash[UNPROVED] == {}


@pytest.mark.parametrize(
    "lengths", [(2, 2), (4, 2), (9, 2, 2), (2, 2, 2), (3, 3, 2, 2)], ids=str
)
def test_a_line_through_a_grid_meets_every_value(lengths: Sequence[int]) -> None:
    cells: list[Any] = list(product(*map(range, lengths)))
    kept = diagonal(cells, [list(axis) for axis in zip(*cells, strict=True)])
    assert len(kept) == max(lengths)
    for axis, length in zip(zip(*kept, strict=True), lengths, strict=True):
        assert {*axis} == {*range(length)}


def test_a_grid_with_gaps_keeps_every_value() -> None:
    cells: list[Any] = [(0, 1), (1, 0), (2, 1)]
    kept = diagonal(cells, [list(axis) for axis in zip(*cells, strict=True)])
    assert {place for place, _ in kept} == {0, 1, 2}
    assert {place for _, place in kept} == {0, 1}
