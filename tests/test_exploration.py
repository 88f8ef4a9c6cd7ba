"""The promises of the journal, on every path that an adversary can force.

``EXPLORE_BUDGET`` and ``EXPLORE_SWEEPS`` in the environment set another bound for
all scenarios; 2 and 2 take some minutes.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from tests.exploration import HELD, Scenario, explore, fail_every_statement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_django.fixtures import SettingsWrapper

# The richest ones get the budget for two mishaps: work that fails, an opening
# balance that does not cover the charge, and one that does not cover the hold. In
# make test they get the budget for one.
DEEP, WIDE = {"budget": 2, "sweeps": 1}, {"budget": 1, "sweeps": 2}
NARROW = {"budget": 1, "sweeps": 1}
SCENARIOS = [
    (Scenario(HELD), WIDE, 90),
    (Scenario(HELD - 3), WIDE, 90),
    (Scenario(0), WIDE, 90),
    (Scenario(HELD + 5), WIDE, 150),
    (Scenario(HELD, raises=True), WIDE, 90),
    (Scenario(HELD, forgotten=True), WIDE, 50),
    (Scenario(HELD, credits=HELD), WIDE, 90),
    (Scenario(HELD, credits=0), DEEP, 200),
    (Scenario(None), DEEP, 500),
    (Scenario(HELD + 5, credits=HELD), DEEP, 800),
    # On trust. The charge is all there is: when it is debited, and credits are added,
    # the reserve that was refused succeeds. A late one may do so, too, or never come.
    (Scenario(HELD - 5, credits=HELD - 5, outage="late"), DEEP, 500),
    (Scenario(HELD + 5, outage="unanswered"), NARROW, 100),
    # Late responses: the lapse charges, and a rendering that fails may cancel that.
    (Scenario(HELD, late="rendered"), WIDE, 90),
    (Scenario(HELD - 3, late="fails"), WIDE, 90),
    (Scenario(HELD, late="nobody"), WIDE, 90),
    (Scenario(HELD + 5, credits=HELD, late="nobody"), NARROW, 90),
    (Scenario(HELD - 5, credits=HELD - 5, outage="late", late="nobody"), NARROW, 80),
    (Scenario(None, outage="unanswered"), NARROW, 100),
    # A key that is tried again while its first attempt, taken for dead, is at work.
    (Scenario(HELD, retry="succeeds"), DEEP, 90),
    (Scenario(HELD, retry="fails"), DEEP, 90),
    (Scenario(HELD, credits=HELD, retry="succeeds"), DEEP, 90),
    (Scenario(HELD, credits=HELD + 5, retry="fails"), DEEP, 90),
]
THOROUGH = "more paths of the adversary"
BRIEFLY = [
    (Scenario(HELD), 80),
    (Scenario(HELD, credits=0), 35),
    (Scenario(None), 75),
    (Scenario(HELD + 5, outage="unanswered"), 40),
    (Scenario(HELD, credits=HELD, retry="succeeds"), 40),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Log nothing: every fault is worth a warning, and there are thousands."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


# One connection, and a savepoint a path: what is tried is the journal.
@pytest.mark.django_db
@pytest.mark.parametrize(
    ("scenario", "bound", "least"),
    [
        *(
            pytest.param(
                *case,
                id=str(case[0]),
                marks=pytest.mark.slow(THOROUGH),
            )
            for case in SCENARIOS
        ),
        *(
            pytest.param(scenario, NARROW, least, id=f"{scenario}, narrow")
            for scenario, least in BRIEFLY
        ),
    ],
)
def test_promises_hold_on_every_path(
    scenario: Scenario,
    bound: dict[str, int],
    least: int,
    settings: SettingsWrapper,
    record_property: Callable[[str, object], None],
) -> None:
    settings.METERLY = {
        **settings.METERLY,
        "TRANSPORT": "tests.exploration.Line",
        "UNAVAILABLE_CAP": HELD,
    }
    bound = {
        name: int(os.environ.get(f"EXPLORE_{name.upper()}", value))
        for name, value in bound.items()
    }
    report = explore(scenario, **bound)
    record_property("exploration", str(report))
    # Less means that the adversary has lost its ways in.
    assert report.states >= least, report
    assert report.ends["released"], report
    if scenario.charge is not None:
        assert report.ends["committed"], report


@pytest.mark.sample(1)
@pytest.mark.django_db
@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(HELD),
        Scenario(HELD + 5),
        Scenario(HELD + 5, credits=HELD),
        Scenario(HELD, raises=True),
        Scenario(HELD, late="rendered"),
        Scenario(HELD, late="fails"),
        Scenario(HELD, late="nobody"),
        Scenario(None),
        Scenario(HELD, credits=0),
    ],
    ids=str,
)
def test_promises_hold_in_process_when_any_statement_fails(scenario: Scenario) -> None:
    # PostgreSQL's functions are one statement each, and a refusal needs few.
    assert fail_every_statement(scenario) >= 5
