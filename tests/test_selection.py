"""What ``make test`` leaves out has another proof there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.selection import UNPROVED

if TYPE_CHECKING:
    import pytest


def test_every_statement_has_a_proof_that_is_not_slow(
    pytestconfig: pytest.Config,
) -> None:
    assert pytestconfig.stash[UNPROVED] == {}
