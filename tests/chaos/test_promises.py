"""The check of the chaos run sees each promise that is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.chaos.promises import Row, Run, World, broken, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable

TAKEN = ("credits_committed", 10)


def _finished(reservation: str, fence: int, **facts: Any) -> Run:
    facts = {"job": 1, "charge": 10, "finished_at": 5.0, "pid": 7, "parent": 6, **facts}
    return Run(reservation=reservation, fence=fence, **facts)


def _world() -> World:
    """A job whose first run was killed, and whose second was charged."""
    return World(
        runs=[
            _finished("a", 0, started_at=1.0, began_at=1.1),
            _finished("b", 0, pid=8, state="SUCCESS", started_at=4.5, began_at=4.6),
        ],
        rows=[
            Row("a", 1, 1, "released", 2, None),
            Row("b", 1, 2, "committed", 0, 10),
        ],
        taken={1: [TAKEN]},
        deaths={7: 6.0},
        lease=3.0,
        granted=100,
        accounts=[(90, 0)],
    )


def test_a_world_in_which_all_is_well_breaks_no_promise() -> None:
    assert broken(_world()) == []


def _charge_twice(world: World) -> None:
    world.rows[0] = replace(world.rows[0], state="committed", charge=10)


def _take_twice(world: World) -> None:
    world.taken[1].append(TAKEN)


def _take_for_nothing(world: World) -> None:
    world.taken[2] = [TAKEN]
    world.accounts = [(80, 0)]


def _charge_unfinished_work(world: World) -> None:
    world.runs[1].finished_at = None
    world.runs[1].state = ""


def _charge_an_outrun_run(world: World) -> None:
    world.rows[1] = replace(world.rows[1], fence=2)


def _charge_what_has_raised(world: World) -> None:
    world.runs[1].gave_up = True
    world.runs[1].state = "STOPPED"


def _take_another_amount(world: World) -> None:
    world.taken[1] = [("credits_committed", 4)]


def _record_another_amount(world: World) -> None:
    world.rows[1] = replace(world.rows[1], charge=4)


def test_a_success_may_be_paid_for_by_the_next_attempt() -> None:
    world = _world()
    world.runs[0].state = "SUCCESS"
    assert broken(world) == []


def _report_what_is_free(world: World) -> None:
    _lose_a_success(world)
    world.runs[0].state = "SUCCESS"


def _lose_a_success(world: World) -> None:
    del world.rows[1], world.runs[1], world.taken[1]
    world.accounts = [(100, 0)]
    world.rows[0] = replace(world.rows[0], fence=0)
    world.deaths = {7: 4.0}


def _share_a_fence(world: World) -> None:
    world.runs.append(Run(job=1, reservation="b", fence=0, began_at=9.0))


def _begin_too_early(world: World) -> None:
    world.runs[1].began_at = 3.9


def _leave(state: str) -> Callable[[World], None]:
    def leave(world: World) -> None:
        world.rows[0] = replace(world.rows[0], state=state)

    return leave


def _leave_stuck(world: World) -> None:
    world.rows[0] = replace(world.rows[0], stuck=True)


def _leave_credits_reserved(world: World) -> None:
    world.accounts = [(90, 10)]


def _lose_credits(world: World) -> None:
    world.accounts = [(80, 0)]


@pytest.mark.parametrize(
    ("happen", "said"),
    [
        (_charge_twice, "charged more than once: 2 rows"),
        (_take_twice, "charged more than once: 1 rows"),
        (_take_for_nothing, "job 2: 10 were taken instead of 0"),
        (_charge_unfinished_work, "no run has finished under the fence"),
        (_charge_an_outrun_run, "no run has finished under the fence"),
        (_charge_what_has_raised, "no run has finished under the fence"),
        (_take_another_amount, "4 were taken instead of 10"),
        (_record_another_amount, "the journal has another charge"),
        (_report_what_is_free, "has ended in success, and is not charged"),
        (_lose_a_success, "neither stopped nor outrun"),
        (_share_a_fence, "two runs worked under fence 0 of b"),
        (_begin_too_early, "began 2.9 s after the run under a, fence 0, which was not"),
        (_leave("intent"), "is left intent"),
        (_leave("reserved"), "is left reserved"),
        (_leave("release_pending"), "is left release_pending"),
        (_leave("commit_pending"), "is left commit_pending"),
        (_leave("unbilled"), "is left unbilled"),
        (_leave("conflict"), "is left conflict"),
        (_leave_stuck, "is left released, stuck"),
        (_leave_credits_reserved, "10 credits are left reserved"),
        (_lose_credits, "10 were taken for jobs, but of 100 80 are left"),
    ],
)
def test_a_broken_promise_is_said(happen: Callable[[World], None], said: str) -> None:
    world = _world()
    happen(world)
    assert said in "\n".join(broken(world))


def test_finished_work_that_was_killed_or_outrun_may_be_free() -> None:
    world = _world()
    _lose_a_success(world)
    for explained in (
        {"deaths": {7: 6.0}},
        # The host, and so the process's parent, too.
        {"deaths": {6: 6.0}},
        {"terminated": {1}},
        {"rows": [replace(world.rows[0], fence=2)]},
    ):
        assert broken(replace(world, **explained)) == []
    world.runs[0].gave_up = True
    assert broken(world) == []
    world.runs[0].gave_up = False
    # A run of which Celery has the outcome was not killed before that.
    world.runs[0].state = "FAILURE"
    assert broken(replace(world, deaths={7: 6.0})) != []


def test_the_next_run_of_one_that_gave_up_may_begin_at_once() -> None:
    world = _world()
    _begin_too_early(world)
    world.runs[0].gave_up = True
    assert broken(world) == []


def test_runs_are_read_from_what_jobs_have_noted() -> None:
    began = {"what": "began", "at": 1.0, "job": 3, "reservation": "a", "fence": 2}
    began |= {"pid": 7, "parent": 6, "started_at": 0.5}
    notes = [
        {**began, "run": "x"},
        {**began, "run": "y", "pid": 8, "fence": 4},
        {"what": "finished", "at": 2.0, "run": "x", "charge": 4},
        {"what": "died", "at": 2.5, "pid": 8, "point": "before reserve_credits"},
        {"what": "ended", "at": 3.0, "run": "x", "state": "SUCCESS"},
        {"what": "gave up", "at": 3.0, "run": "y"},
    ]
    first, second = runs_of(notes)
    assert (first.fence, first.charge, first.finished_at) == (2, 4, 2.0)
    assert (first.state, first.pid, first.parent) == ("SUCCESS", 7, 6)
    assert (first.started_at, first.began_at, first.gave_up) == (0.5, 1.0, False)
    assert not second.finished
    assert second.gave_up
    assert second.state == ""
