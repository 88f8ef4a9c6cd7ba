"""Processes that are killed at the worst of moments; the sweeper makes it good."""

from __future__ import annotations

import signal
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from django.contrib.auth.models import Group, User
from django.core.management import call_command

from django_meterly import guard
from django_meterly.ledger import postgresql
from django_meterly.models import Grant
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.books import balance, fund, movements, states
from tests.children import PATIENCE, dying_transport, environment, started

if TYPE_CHECKING:
    from pathlib import Path

    from django_meterly.models import Customer

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.database,
    pytest.mark.sample(1),
]

HELD = ["reserved"]
RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]
OVERAGE = [*COMMITTED, "used"]


@pytest.fixture
def customer(user: User) -> Customer:
    return fund(user)


@pytest.fixture
def run(tmp_path: Path, settings: Any) -> Any:
    """Run a function of ``tests.dying`` in a process, until it dies at *point*."""

    def run(call: str, point: str, *, atomic_requests: bool = False) -> None:
        env = environment(
            atomic_requests=atomic_requests,
            TRANSPORT=dying_transport(settings.METERLY["TRANSPORT"]),
        )
        log = tmp_path / "log"
        code = f"from tests import dying; dying.{call}"
        with started(
            "django", "shell", "-c", code, env={**env, "DIE_AT": point}, log=log
        ) as child:
            child.communicate("go\n", timeout=PATIENCE)
        # Killed by itself: it did come to that point.
        assert child.returncode == -signal.SIGKILL, log.read_text()

    return run


class Death(NamedTuple):
    """Where a request's process dies, what that leaves, and what comes of it."""

    point: str
    left: list[str]
    left_movements: list[str]
    outcome: list[str]
    movements: list[str]
    work_done: bool = True
    data: str = ""
    atomic: bool = False

    @property
    def id(self) -> str:
        return "-".join(
            filter(None, [self.point, self.data, "atomic" if self.atomic else ""])
        )


# A ledger of its own: every step is durable by itself.
REMOTE = [
    Death(
        "before:reserve_credits",
        ["intent"],
        [],
        ["released"],
        RELEASED,
        work_done=False,
    ),
    Death(
        "after:reserve_credits",
        ["intent"],
        HELD,
        ["released"],
        RELEASED,
        work_done=False,
    ),
    Death("work", ["reserved"], HELD, ["released"], RELEASED),
    Death(
        "work",
        ["reserved"],
        HELD,
        ["released"],
        RELEASED,
        work_done=False,
        atomic=True,
    ),
    Death(
        "before:commit_reservation", ["commit_pending"], HELD, ["committed"], COMMITTED
    ),
    Death(
        "before:commit_reservation",
        ["commit_pending"],
        HELD,
        ["committed"],
        COMMITTED,
        atomic=True,
    ),
    Death("commit", ["commit_pending"], HELD, ["committed"], COMMITTED, atomic=True),
    Death(
        "after:commit_reservation",
        ["commit_pending"],
        COMMITTED,
        ["committed"],
        COMMITTED,
    ),
    Death(
        "after:commit_reservation",
        ["commit_pending"],
        COMMITTED,
        ["committed"],
        COMMITTED,
        atomic=True,
    ),
    Death(
        "before:use_credits",
        ["commit_pending"],
        COMMITTED,
        ["committed"],
        OVERAGE,
        data="used=30",
    ),
    Death(
        "after:use_credits",
        ["commit_pending"],
        OVERAGE,
        ["committed"],
        OVERAGE,
        data="used=30",
        atomic=True,
    ),
    Death(
        "before:release_reservation",
        ["release_pending"],
        HELD,
        ["released"],
        RELEASED,
        data="status=400",
    ),
    Death(
        "after:release_reservation",
        ["release_pending"],
        RELEASED,
        ["released"],
        RELEASED,
        data="status=400",
    ),
]
# A ledger in the journal's transactions: all of a step, or nothing of it.
JOINED = [
    Death("before:reserve_credits", [], [], [], [], work_done=False),
    Death("work", ["reserved"], HELD, ["released"], RELEASED),
    Death(
        "after:commit_reservation",
        ["reserved"],
        HELD,
        ["released"],
        RELEASED,
        work_done=False,
        atomic=True,
    ),
    Death("commit", ["committed"], COMMITTED, ["committed"], COMMITTED, atomic=True),
    Death(
        "before:use_credits",
        ["reserved"],
        HELD,
        ["released"],
        RELEASED,
        data="used=30",
        work_done=False,
        atomic=True,
    ),
]
if postgresql.serves("default"):
    # The step was one statement, and with that it is durable.
    JOINED += [
        Death(
            "after:reserve_credits",
            ["reserved"],
            HELD,
            ["released"],
            RELEASED,
            work_done=False,
        ),
        Death(
            "after:commit_reservation",
            ["committed"],
            COMMITTED,
            ["committed"],
            COMMITTED,
        ),
        Death(
            "after:release_reservation",
            ["released"],
            RELEASED,
            ["released"],
            RELEASED,
            data="status=400",
        ),
    ]
else:
    JOINED += [
        Death("after:reserve_credits", [], [], [], [], work_done=False),
        Death("after:commit_reservation", ["reserved"], HELD, ["released"], RELEASED),
        Death(
            "after:release_reservation",
            ["reserved"],
            HELD,
            ["released"],
            RELEASED,
            data="status=400",
        ),
    ]


def sweep() -> str:
    lapse_leases()
    call_command("meterly_settle", stdout=(out := StringIO()))
    return out.getvalue()


def check_death(death: Death, customer: Customer, run: Any) -> None:
    run(f"request_work({death.data})", death.point, atomic_requests=death.atomic)
    assert states() == death.left
    assert movements() == death.left_movements
    assert Group.objects.count() == death.work_done

    for _again in range(2):
        sweep()
        assert states() == death.outcome
        assert movements() == death.movements
        charged = 25 * ("committed" in movements()) + 5 * ("used" in movements())
        assert balance(customer) == (100 - charged, 0)
        assert_books_balance()


@pytest.mark.parametrize("death", [pytest.param(d, id=d.id) for d in REMOTE])
def test_f15_the_sweeper_carries_out_what_a_dead_process_left(
    death: Death, remote: Any, customer: Customer, run: Any
) -> None:
    check_death(death, customer, run)


@pytest.mark.parametrize("death", [pytest.param(d, id=d.id) for d in JOINED])
def test_f15_a_dead_process_leaves_no_half_step_in_one_database(
    death: Death, joined: None, customer: Customer, run: Any
) -> None:
    check_death(death, customer, run)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_f38_a_sweeper_that_dies_within_a_row_loses_nothing(
    moment: str, any_ledger: Any, customer: Customer, run: Any
) -> None:
    for _ in range(3):
        guard(customer, 10).lifecycle.reserve()
    lapse_leases()
    run("settle()", f"{moment}:release_reservation")
    assert set(states()) == {"release_pending"}

    # The others do not wait for the row it was at. Its claim on that one is still
    # good; in one database it went with the transaction.
    claimed = 1 if any_ledger else 0
    call_command("meterly_settle", stdout=(out := StringIO()))
    assert out.getvalue().startswith(f"0 lapsed, {3 - claimed} tried")
    assert states().count("release_pending") == claimed

    assert sweep().startswith(f"0 lapsed, {claimed} tried")
    assert states() == ["released"] * 3
    assert movements() == ["reserved"] * 3 + ["released"] * 3
    assert balance(customer) == (100, 0)
    assert_books_balance()


def test_a_grant_whose_process_died_is_granted_once(
    any_ledger: Any, customer: Customer, run: Any
) -> None:
    run("grant(50)", "after:grant_credits")
    died = Grant.objects.get(reference="dying")
    assert died.state == Grant.State.PENDING
    assert balance(customer) == (150, 0)

    assert sweep() == "0 lapsed, 0 tried, 1 pending grants asked again.\n"
    assert sweep() == "0 lapsed, 0 tried, 0 pending grants asked again.\n"
    died.refresh_from_db()
    assert died.state == Grant.State.GRANTED
    assert balance(customer) == (150, 0)
    assert_books_balance()
