"""What must be true of a site whose processes were killed, and the check of it.

The evidence is the jobs' own (``notes``), the journal's rows and the ledger's
entries. A *run* is one execution of a job by a worker; a job has several when it was
retried, or when its message came again. A run has *finished* when its work was done
and it had said what that costs; what it has done by then is not lost by a kill, but
nobody else knows of it. It has *ended* when Celery has its outcome, after the
decision.

1. A job is charged at most once: one ``committed`` row at most, one commit or one
   debit of what was held at most, and the ledger has taken nothing, or exactly what
   one finished run said.
2. It is charged by the run that the journal says has decided: that of the row's
   reservation and of its fence. So a job that no run has finished is free: one that
   failed, was revoked, or never came.
3. A run that has ended in success is charged, or another attempt at its job is, which
   began while the run was taken for dead. Nobody is told of a success that is free.
4. A run that has finished and is not charged was killed before it ended, or stopped
   cold before it returned, or another run has taken its work up. Nothing else makes
   done work free.
5. No two runs have worked under the same fence of the same reservation.
6. No run begins while another one's first lease is good, unless that one has raised,
   or was about to hand over to its retry: dead or not, it has had its
   ``LEASE_GRACE``.
7. In the end nothing is open, due, owed, stuck or in conflict, no account has
   credits reserved, what was taken is what the balances lack, and
   ``meterly_ledger_verify`` finds no difference.

Not promised, because no journal could: that a run which has finished and is killed
before its success is recorded is charged. It is free, and its redelivery may do the
work again and be charged. Nor that each message is delivered: a broker may lose some
(kombu takes a message off a list of Redis before it puts it among the
unacknowledged), and such a job is free.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

#: The kinds of entries that take credits.
TAKING = ("credits_committed", "credits_used")


@dataclass
class Run:
    """One execution of a job, as it noted itself."""

    job: int
    reservation: str
    fence: int
    pid: int = 0
    parent: int = 0
    #: When Celery had started it, before its lease, and when its own code began.
    started_at: float = 0.0
    began_at: float = 0.0
    #: Whether it has raised, to fail or in a cold shutdown, or was about to retry.
    gave_up: bool = False
    charge: int | None = None
    finished_at: float | None = None
    state: str = ""

    @property
    def finished(self) -> bool:
        return self.finished_at is not None

    def __str__(self) -> str:
        return f"the run under {self.reservation}, fence {self.fence},"


@dataclass(frozen=True)
class Row:
    """What the journal has of one attempt."""

    id: str
    job: int
    attempt: int
    state: str
    fence: int
    charge: int | None
    stuck: bool = False


@dataclass
class World:
    """All that is known when everything is over.

    *taken* are the kinds and amounts of what the ledger took for each job, *deaths*
    the last time at which a process was killed, *terminated* the jobs whose runs
    Celery was told to kill. *lease* is the shortest one, in seconds; *accounts* are
    pairs of a balance and what is reserved.
    """

    runs: list[Run] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    taken: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    deaths: dict[int, float] = field(default_factory=dict)
    terminated: set[int] = field(default_factory=set)
    lease: float = 0.0
    granted: int = 0
    accounts: list[tuple[int, int]] = field(default_factory=list)

    def charged(self, job: int) -> int:
        return sum(amount for _, amount in self.taken.get(job, []))


def runs_of(notes: list[dict[str, Any]]) -> list[Run]:
    """Return the runs that *notes* tell of, in the order in which they began."""
    runs: dict[str, Run] = {}
    for one in notes:
        if one["what"] == "began":
            names = ("job", "reservation", "fence", "pid", "parent")
            facts = {name: one[name] for name in names}
            times = {"started_at": one["started_at"], "began_at": one["at"]}
            runs[one["run"]] = Run(**times, **facts)
        elif one["what"] == "gave up":
            runs[one["run"]].gave_up = True
        elif one["what"] == "finished":
            runs[one["run"]].finished_at = one["at"]
            runs[one["run"]].charge = one["charge"]
        elif one["what"] == "ended":
            runs[one["run"]].state = one["state"]
    return list(runs.values())


def broken(world: World) -> list[str]:
    """Return which promises are broken, and how."""
    found = []
    jobs = {run.job for run in world.runs} | {row.job for row in world.rows}
    for job in sorted(jobs | set(world.taken)):
        found += [f"job {job}: {what}" for what in _broken_for(world, job)]
    fences = [(run.reservation, run.fence) for run in world.runs]
    found += [
        f"two runs worked under fence {fence} of {reservation}"
        for reservation, fence in sorted(set(fences))
        if fences.count((reservation, fence)) > 1
    ]
    final = ("denied", "failed", "released", "committed")
    for row in world.rows:
        if row.state not in final or row.stuck:
            stuck = ", stuck" if row.stuck else ""
            found.append(f"job {row.job}: {row.id} is left {row.state}{stuck}")
    reserved = sum(reserved for _, reserved in world.accounts)
    if reserved:
        found.append(f"{reserved} credits are left reserved")
    taken = sum(world.charged(job) for job in world.taken)
    balances = sum(balance for balance, _ in world.accounts)
    if taken != world.granted - balances:
        found.append(
            f"{taken} were taken for jobs, but of {world.granted} {balances} are left"
        )
    return found


def _broken_for(world: World, job: int) -> list[str]:
    runs = [run for run in world.runs if run.job == job]
    rows = [row for row in world.rows if row.job == job]
    kinds = [kind for kind, _ in world.taken.get(job, [])]
    charged = world.charged(job)
    committed = [row for row in rows if row.state == "committed"]
    found = []
    if len(committed) > 1 or kinds.count(TAKING[0]) > 1 or kinds.count(TAKING[1]) > 1:
        found.append(f"charged more than once: {len(committed)} rows, {kinds}")
    decisive = [
        run
        for run in runs
        for row in committed
        if run.finished
        and not run.gave_up
        and (run.reservation, run.fence) == (row.id, row.fence)
    ]
    if committed and not decisive:
        found.append("charged, but no run has finished under the fence that decided")
    right = decisive[0].charge if decisive else 0
    if charged != right:
        found.append(f"{charged} were taken instead of {right}")
    if sum(row.charge or 0 for row in committed) != right:
        found.append("the journal has another charge than the run that decided")
    for former, run in itertools.combinations(runs, 2):
        since = run.began_at - former.started_at
        if since < world.lease and not former.gave_up:
            found.append(f"{run} began {since:.1f} s after {former} which was not over")
    for run in runs:
        if run in decisive:
            continue
        if run.state == "SUCCESS":
            if committed and _tried_again(run, rows):
                # Noted while the next attempt was at work, which was then charged.
                continue
            found.append(f"{run} has ended in success, and is not charged")
        elif (
            run.finished
            and not run.gave_up
            and not (_outrun(run, rows) or _killed(run, world))
        ):
            found.append(
                f"{run} has finished and is free, but was neither stopped nor outrun "
                f"(it ended as {run.state or 'nothing'})"
            )
    return found


def _outrun(run: Run, rows: list[Row]) -> bool:
    own = next((row for row in rows if row.id == run.reservation), None)
    return own is not None and (own.fence > run.fence or _tried_again(run, rows))


def _tried_again(run: Run, rows: list[Row]) -> bool:
    own = next((row for row in rows if row.id == run.reservation), None)
    return own is not None and any(row.attempt > own.attempt for row in rows)


def _killed(run: Run, world: World) -> bool:
    if run.state or run.finished_at is None:
        return False
    died_at = max(world.deaths.get(run.pid, 0), world.deaths.get(run.parent, 0))
    return died_at >= run.finished_at or run.job in world.terminated
