"""Every interleaving of one guarded piece of work, up to a bound.

The real guard, journal, sweeper and embedded ledger run here; what is explored
is everything around them. A worker and sweepers run as threads that hand a baton
on, so that one moves at a time. Each stops before every ledger call and every
UPDATE of the journal, and an adversary says what happens next: the step goes
well, its answer is lost, the process dies, another one moves, time passes.

A path is the list of what the adversary said. Paths are run from the start, each
in a savepoint, and given up where they come to a state that was seen before.
The adversary has a *budget*: the ordinary course of things is free, anything
else costs one.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from django.db import OperationalError, connections, transaction
from django.db.models import Sum

from django_meterly import journal
from django_meterly.client import get_client
from django_meterly.errors import (
    MeterlyError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
)
from django_meterly.guards import Guard
from django_meterly.journal import deciding, opening, settling
from django_meterly.ledger import expiry
from django_meterly.ledger.models import Account, Entry, Hold
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.lifecycle import Lifecycle
from django_meterly.models import Customer, Reservation
from django_meterly.policies import Policies
from django_meterly.transports.base import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Django 6.1 calls it by another name. Not atomic(): the guard refuses to be used
# inside a block that is not TestCase's own.
savepoint_create = getattr(transaction, "savepoint_create", None) or (
    transaction.savepoint
)


State = Reservation.State
JOURNAL = Reservation._meta.db_table
PAST = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)

HELD = 10
#: More than any path needs.
PLENTY = 100

#: What may become of a ledger call, besides an answer.
FAULTS = {
    # Never sent, and that is known.
    "unsent": MeterlyNotSentError,
    # Carried out, and the answer is lost.
    "unanswered": MeterlyUnknownOutcomeError,
    # Not carried out yet; perhaps later, perhaps never.
    "late": MeterlyUnknownOutcomeError,
}

#: The diagram of ``journal``, and the replay of a key that an older journal used.
TRANSITIONS = {
    (None, State.INTENT),
    (State.INTENT, State.DENIED),
    (State.INTENT, State.FAILED),
    (State.INTENT, State.RESERVED),
    (State.INTENT, State.RELEASE_PENDING),
    (State.RESERVED, State.RELEASE_PENDING),
    (State.RESERVED, State.COMMIT_PENDING),
    (State.RELEASE_PENDING, State.RELEASED),
    (State.RELEASE_PENDING, State.COMMIT_PENDING),
    (State.RELEASED, State.COMMIT_PENDING),
    (State.COMMIT_PENDING, State.COMMITTED),
    (State.COMMIT_PENDING, State.UNBILLED),
    (State.UNBILLED, State.COMMITTED),
}


#: What the adversary said, and what it cost.
Path = tuple[tuple[str, int], ...]


class Broken(AssertionError):
    """A promise was broken; says which, and the path that broke it."""


class Died(BaseException):
    """The process is gone. Nothing in the journal catches this, or cleans up."""


@dataclass(frozen=True)
class Scenario:
    """What the work is like: *credits* at the start, and what success charges.

    A *charge* of ``None`` is work that fails.
    """

    charge: int | None
    credits: int = PLENTY
    #: Whether an exception follows the recorded success, as from a COMMIT.
    raises: bool = False
    #: Whether the journal has lost what it knew, as one restored from a backup.
    forgotten: bool = False
    #: What becomes of the first reserve: one of ``FAULTS``; the work runs on trust.
    outage: str = ""
    #: What becomes of a response that is still to come when the work has returned:
    #: it is "rendered", it "fails" to be, or "nobody" waits for it.
    late: str = ""
    #: What becomes of the work when somebody asks for it again by the same key: it
    #: "succeeds", for one credit less, or "fails".
    retry: str = ""

    def __str__(self) -> str:
        return (
            f"charge={self.charge} of {HELD} held, {self.credits} credits"
            + ", then raises" * self.raises
            + ", forgotten" * self.forgotten
            + (self.outage and f", on trust, {self.outage}")
            + (self.late and f", late, {self.late}")
            + (self.retry and f", tried again, {self.retry}")
        )


class Actor:
    """A thread that runs *script* from one point to the next when told to."""

    def __init__(self, world: World, name: str, script: Callable[[], None]) -> None:
        self.world = world
        self.name = name
        self.script = script
        #: What it will do next: a ledger operation, or "write".
        self.next = "start"
        #: What it has seen so far. The code is deterministic, so this is where
        #: it stands.
        self.seen: tuple[Any, ...] = ()
        self.alive = True
        self.in_ledger = False
        self.error: BaseException | None = None
        self._order = ""
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connections[world_alias()] = self.world.connection
        self._mine.acquire()
        try:
            if self._order != "die":
                self.script()
        except Died:
            pass
        except BaseException as exc:  # noqa: BLE001
            self.error = exc
        self.alive = False
        self._theirs.release()

    def step(self, order: str) -> None:
        """Let the actor do what it is about to, as *order* says; then it waits."""
        self._order = order
        self.world.running = self
        self._mine.release()
        self._theirs.acquire()
        self.world.running = None
        if not self.alive:
            self._thread.join()
        if self.error is not None:
            raise Broken(f"{self.name} raised {self.error!r}") from self.error

    def point(self, action: str) -> str:
        """Wait before *action*; return the order, or die of it."""
        self.next = action
        self._theirs.release()
        self._mine.acquire()
        if self._order == "die":
            raise Died
        return self._order

    def note(self, *what: Any) -> None:
        self.seen += what


def world_alias() -> str:
    return journal.alias()


class Line(LedgerTransport):
    """The line between the journal and a ledger that is far away."""

    world: ClassVar[World]

    def joins(self, using: str) -> bool:
        return False

    def send(self, call: Call) -> dict[str, Any]:
        world = self.world
        actor = world.running
        order = "go" if actor is None else actor.point(call.operation)
        world.check_call(call)
        if order == "late":
            world.late.append(call)
        try:
            answer = None
            if order in ("go", "unanswered"):
                try:
                    answer = self.carry_out(call)
                finally:
                    if order in FAULTS:
                        raise FAULTS[order](order)
            else:
                raise FAULTS[order](order)
        except MeterlyError as exc:
            if actor is not None:
                actor.note(type(exc).__name__)
            raise
        if actor is not None:
            actor.note(answer.get("status", "done"))
        return answer

    def carry_out(self, call: Call) -> dict[str, Any]:
        actor = self.world.running
        if actor is not None:
            actor.in_ledger = True
        try:
            return super().send(call)
        finally:
            if actor is not None:
                actor.in_ledger = False


class World:
    """One path: the actors, the two databases, and what is on its way."""

    def __init__(self, scenario: Scenario, customer: Customer, sweeps: int) -> None:
        self.scenario = scenario
        self.customer = customer
        self.connection = connections[world_alias()]
        self.sweeps = sweeps
        self.running: Actor | None = None
        self.actors: list[Actor] = []
        self.current: Actor | None = None
        self.late: list[Call] = []
        self.calls: dict[tuple[str, int], Any] = {}
        #: Whether credits may be held although the row is settled.
        self.straggler = False
        #: What is to be charged for each attempt of which the journal has heard that
        #: it succeeded. One of them is charged.
        self.owed: dict[int, int] = {}
        self.retries = int(bool(scenario.retry))
        #: The state of each attempt.
        self.states: dict[int, str] = {}
        self.trace: list[str] = []
        Line.world = self

    # The actors

    def work(self) -> None:
        lifecycle = Lifecycle(
            self.customer,
            HELD,
            "credits",
            Policies(
                ttl_seconds=300,
                on_unavailable="allow" if self.scenario.outage else "deny",
            ),
            reference="work",
            idempotency_key="work",
        )
        guard = Guard(lifecycle)
        try:
            lifecycle.reserve()
        except MeterlyError:
            return
        assert guard.reservation is not None
        self._check_hold(guard.reservation)
        if guard.reservation.attempt > 1:
            assert self.scenario.charge is not None
            guard.charge(self.scenario.charge - 1)
            succeeds = self.scenario.retry == "succeeds"
            lifecycle.succeed() if succeeds else lifecycle.fail()
        elif self.scenario.charge is None:
            lifecycle.fail()
        elif self.scenario.forgotten:
            held = str(guard.reservation.reservation_id)
            try:
                self.past_the_journal(
                    Call("commit_reservation", {"reservationId": held}, "lost")
                )
            except MeterlyError:
                return
            self.owed[1] = HELD
        elif self.scenario.late:
            guard.charge(self.scenario.charge)
            try:
                with get_client().transport.unit_of_work(world_alias()):
                    lifecycle.presume()
            except OperationalError:
                # The work was rolled back together with what its return said.
                self.owed.clear()
                lifecycle.fail()
                return
            if self.scenario.late == "rendered":
                lifecycle.succeed()
            elif self.scenario.late == "fails":
                lifecycle.cancel()
        elif self.scenario.raises:
            guard.charge(self.scenario.charge)
            try:
                # The view's own, as far as the ledger joins it.
                with get_client().transport.unit_of_work(world_alias()):
                    lifecycle.decide()
            except OperationalError:
                # The work was rolled back together with its decision.
                self.owed.clear()
            else:
                # One statement of PostgreSQL does not record the success by itself.
                self.owed[1] = self.scenario.charge
            lifecycle.fail()
        else:
            guard.charge(self.scenario.charge)
            lifecycle.succeed()

    def sweep(self) -> None:
        journal.sweep(get_client())

    # What the adversary can say

    def options(self, budget: int) -> list[tuple[str, int]]:
        """Return what can happen now and what it costs, the ordinary thing first."""
        options: list[tuple[str, int]] = []
        actor = self.current
        outage = self.scenario.outage if not self.calls else ""
        if outage and actor is not None and actor.next == "reserve_credits":
            options.append((outage, 0))
        elif actor is not None:
            options.append(("go", 0))
            if actor.next not in ("start", "write"):
                options += [(fault, 1) for fault in FAULTS]
            if actor.next != "start":
                options.append(("die", 1))
        else:
            options.append(("finish", 0))
        price = 1 if actor is not None else 0
        options += [
            (f"to {other.name}", price) for other in self._live() if other is not actor
        ]
        states = set(self.states.values())
        # A success that was noted is owed, too.
        to_sweep = states & self.SWEPT or (self.owed and State.COMMITTED not in states)
        if self.sweeps and to_sweep and len(self._live()) < 3:
            options.append(("sweep", price))
        if self.retries and states <= set(State.free()):
            options.append(("retry", price))
        if self.late:
            options.append(("deliver", 1))
        if (Hold.Status.RESERVED, False) in holds():
            options.append(("expire", 1))
        options.append(("credits", 1))
        return [option for option in options if option[1] <= budget]

    SWEPT: ClassVar[set[str]] = {*State.open(), *State.pending()}

    def apply(self, choice: str) -> None:
        actor = self.current
        doing = f"{actor.name} at {actor.next}: " if actor is not None else ""
        self.trace.append(doing + choice)
        if choice in ("go", "die", *FAULTS):
            assert actor is not None
            actor.step(choice)
            if not actor.alive:
                self.current = None
        elif choice == "sweep":
            self.sweeps -= 1
            time_passes()
            names = {live.name for live in self._live()}
            name = "sweeper" if "sweeper" not in names else "other sweeper"
            self.start(name, self.sweep)
        elif choice == "retry":
            self.retries -= 1
            self.start("retry", self.work)
        elif choice.startswith("to "):
            self.current = next(a for a in self.actors if f"to {a.name}" == choice)
        elif choice == "deliver":
            self.deliver()
        elif choice == "expire":
            Hold.objects.update(expires_at=PAST)
        elif choice == "credits":
            self.spend_or_top_up()
        else:
            raise AssertionError(choice)
        self._check_state()

    def start(self, name: str, script: Callable[[], None]) -> None:
        self.current = Actor(self, name, script)
        self.actors = [*self._live(), self.current]
        # Up to its first point; nothing has happened before it.
        self.current.step("go")
        if not self.current.alive:
            self.current = None

    def deliver(self) -> None:
        self.straggler = True
        for call in self.late:
            try:
                self.past_the_journal(call)
            except MeterlyError:
                pass
        self.late.clear()

    def past_the_journal(self, call: Call) -> None:
        get_client().transport.carry_out(call)  # type: ignore[attr-defined]

    def spend_or_top_up(self) -> None:
        """Spend what is available on other things, or add credits if none is."""
        account = Account.objects.get()
        if account.available:
            self._other("use_credits", account.available)
        else:
            self._other("add_credits", PLENTY)

    def _other(self, operation: str, amount: int) -> None:
        client = get_client()
        number = Entry.objects.count()
        customer_id = str(self.customer.customer_id)
        with mock.patch.object(self, "check_call"):
            getattr(client, operation)(
                customer_id, amount, "credits", f"other-{number}"
            )

    def bury(self) -> None:
        """End every thread that still waits."""
        for actor in self._live():
            actor.step("die")

    def _live(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.alive]

    # What is seen of the database

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stop actors before their UPDATEs of the journal."""

        def wrapper(
            execute: Any, sql: str, params: Any, many: bool, context: Any
        ) -> Any:
            actor = self.running
            if actor is None or actor.in_ledger or JOURNAL not in sql:
                return execute(sql, params, many, context)
            if not sql.startswith("UPDATE"):
                result = execute(sql, params, many, context)
                if sql.startswith("SELECT"):
                    actor.note(self._outside(row_key))
                return result
            actor.point("write")
            result = execute(sql, params, many, context)
            actor.note(context["cursor"].rowcount)
            return result

        record_success, trust = deciding.record_success, opening._trust
        presume, record_failure = deciding.presume, deciding.record_failure
        opened, record_late = opening.opened, deciding.record_late_success
        record_debt = settling._record_debt

        @contextmanager
        def one_step() -> Iterator[None]:
            # One transaction, and so one step: there is but one connection.
            actor = self.running
            if actor is None:
                yield
                return
            actor.point("write")
            actor.in_ledger = True
            try:
                yield
            finally:
                actor.in_ledger = False
                actor.note(self._outside(row_key))

        def trusted(*args: Any) -> bool:
            with one_step():
                return trust(*args)

        def recorded_late(*args: Any) -> bool:
            with one_step():
                return record_late(*args)

        def recorded_debt(*args: Any) -> None:
            with one_step():
                record_debt(*args)

        @contextmanager
        def opened_at_once(using: str, row: Reservation) -> Iterator[None]:
            # The transaction is over before the ledger is asked, if it is far away.
            if get_client().transport.joins(using):
                with opened(using, row):
                    yield
                return
            with one_step(), opened(using, row):
                pass
            yield

        def recorded(row: Reservation, charge: int, **options: Any) -> bool:
            taken = record_success(row, charge, **options)
            # Whatever it says: nobody told the worker not to deliver.
            self.owed[row.attempt] = charge
            return taken

        def presumed(row: Reservation, charge: int, **options: Any) -> bool:
            taken = presume(row, charge, **options)
            # From now on it is charged, if nothing else happens.
            self.owed[row.attempt] = charge
            return taken

        def failed(row: Reservation, **options: Any) -> bool:
            taken = record_failure(row, **options)
            if taken:
                self.owed.pop(row.attempt, None)
            return taken

        with (
            self.connection.execute_wrapper(wrapper),
            # Guards call these by the journal's names, the journal by its rooms'.
            mock.patch.multiple(
                journal,
                presume=presumed,
                record_failure=failed,
                record_success=recorded,
            ),
            mock.patch.multiple(
                deciding,
                record_failure=failed,
                record_late_success=recorded_late,
                record_success=recorded,
            ),
            mock.patch.multiple(opening, opened=opened_at_once, _trust=trusted),
            mock.patch.object(settling, "_record_debt", recorded_debt),
        ):
            yield

    def _outside(self, read: Callable[[], Any]) -> Any:
        actor, self.running = self.running, None
        try:
            return read()
        finally:
            self.running = actor

    def key(self) -> Any:
        """Return all that the future depends on."""
        return (
            row_key(),
            read("SELECT balance, reserved FROM meterly_ledger_account"),
            holds(),
            tuple(
                (kind, amount, (key or "").rpartition("~")[2] if hold else reference)
                for kind, amount, key, hold, reference in read(
                    "SELECT kind, amount, idempotency_key, hold_id, reference "
                    "FROM meterly_ledger_entry ORDER BY id"
                )
            ),
            tuple((call.operation, attempt_of(call)) for call in self.late),
            self.straggler,
            tuple(sorted(self.owed.items())),
            self.sweeps,
            self.retries,
            # Two sweepers are alike.
            tuple(
                sorted(
                    repr((a.name[-7:], a.next, a.seen, a is self.current))
                    for a in self._live()
                )
            ),
        )

    # The promises

    def _check_state(self) -> None:
        states = row_states()
        for attempt, state in states.items():
            before = self.states.get(attempt)
            step = (before, state)
            if self.scenario.forgotten and step == (
                State.RELEASE_PENDING,
                State.COMMITTED,
            ):
                pass  # A lease's release has found out.
            elif state != before and step not in TRANSITIONS:
                raise Broken(f"Attempt {attempt} went from {before} to {state}.")
        self.states = states
        if sum(state in State.charged() for state in states.values()) > 1:
            raise Broken(f"A key is charged twice: {states}.")

    def check_call(self, call: Call) -> None:
        """A decision is durable before the ledger hears of it; keys are stable."""
        attempt = attempt_of(call)
        sent = (call.idempotency_key, dict(call.arguments))
        if self.calls.setdefault((call.operation, attempt), sent) != sent:
            raise Broken(f"{call.operation} was sent with another key or body.")
        state = self._outside(row_states).get(attempt)
        if call.operation in ("commit_reservation", "use_credits"):
            allowed: tuple[str, ...] = (
                State.COMMIT_PENDING,
                State.COMMITTED,
                State.UNBILLED,
            )
        elif call.operation == "release_reservation":
            allowed = tuple(set(State) - set(State.open()))
        else:
            # A reserve that is slower than lease and sweeper, and then succeeds:
            # that hold ends with its time to live.
            self.straggler = self.straggler or state in State.free()
            return
        if state not in allowed:
            raise Broken(f"{call.operation} was sent while the row was {state}.")

    def _check_hold(self, row: Reservation) -> None:
        """Work runs on a row that is reserved, and on a hold nobody has closed."""
        state = self._outside(row_states).get(row.attempt)
        if state != State.RESERVED:
            raise Broken(f"The work runs on a row that is {state}.")
        held = self._outside(lambda: Reservation.objects.get(pk=row.pk).reservation_id)
        if not held:
            if self.scenario.outage:
                return
            raise Broken("The work runs on a hold whose id is not recorded.")
        status = self._outside(lambda: Hold.objects.get(public_id=held).status)
        if status not in (Hold.Status.RESERVED, Hold.Status.EXPIRED):
            raise Broken(f"The work runs on a hold that is {status}.")

    def check_end(self) -> None:
        """Nobody is at work any more: let time pass, and look at the books."""
        self._settle()
        self._check_books()
        live = Hold.objects.filter(status=Hold.Status.RESERVED)
        # One that was found by a settler that died, when another was told that
        # there is none, ends with its time to live.
        unheld = Reservation.objects.filter(reservation_id=journal.NO_HOLD)
        if live.exists() and not self.straggler and not unheld.exists():
            raise Broken("A hold was left behind.")
        if self.late:
            self.deliver()
            self._settle()
            self._check_books()
        Hold.objects.update(expires_at=PAST)
        expiry.expire_due()
        self._check_books()
        if Account.objects.get().reserved:
            raise Broken("Credits are held for ever.")

    def _settle(self) -> None:
        for _ in range(3):
            time_passes()
            journal.sweep(get_client())
        self.states = row_states()
        if State.UNBILLED in self.states.values():
            account = Account.objects.get()
            if account.available >= max(self.owed.values()):
                raise Broken("There are credits, but the debt is not paid.")
            self._other("add_credits", PLENTY)
            time_passes()
            journal.sweep(get_client())
            self.states = row_states()

    def _check_books(self) -> None:
        account = Account.objects.get()
        sums = Entry.objects.aggregate(
            balance=Sum("balance_delta"), reserved=Sum("reserved_delta")
        )
        if (account.balance, account.reserved) != (sums["balance"], sums["reserved"]):
            raise Broken(f"The books do not balance: {account.balance} {sums}")
        charges = -(
            Entry.objects.exclude(reference__startswith="other-")
            .exclude(kind__in=[Entry.Kind.GRANTED, Entry.Kind.ADDED])
            .aggregate(sum=Sum("balance_delta"))["sum"]
            or 0
        )
        if charges not in (set(self.owed.values()) or {0}):
            raise Broken(f"{charges} credits were charged, {self.owed} are owed.")
        ends = sorted(set(self.states.values()) - set(State.free()))
        if ends != [State.COMMITTED] * bool(self.owed):
            raise Broken(f"The rows end {self.states}, and {self.owed} are owed.")


def attempt_of(call: Call) -> int:
    """Return the number of the attempt that *call* is sent for."""
    number = (call.idempotency_key or "").rpartition("~")[2].partition(":")[0]
    return int(number) if number.isdecimal() else 1


# Read past the ORM: this is what the exploration spends its time on.


def read(sql: str) -> tuple[Any, ...]:
    with connections[world_alias()].cursor() as cursor:
        cursor.execute(sql)
        return tuple(cursor.fetchall())


def holds() -> tuple[Any, ...]:
    """Return the state of every hold, and whether it is past its time."""
    return tuple(
        (status, _past(expires_at))
        for status, expires_at in read(
            "SELECT status, expires_at FROM meterly_ledger_hold ORDER BY id"
        )
    )


def row_states() -> dict[int, str]:
    """Return the state of each attempt."""
    return dict(read(f"SELECT attempt, state FROM {JOURNAL} ORDER BY attempt"))


def row_key() -> Any:
    """Return the row, as far as the future depends on it."""
    return tuple(
        (*values, _past(lease_until), _past(next_attempt_at), stuck_at is None)
        for lease_until, next_attempt_at, stuck_at, *values in read(
            "SELECT lease_until, next_attempt_at, stuck_at, attempt, state, charge, "
            "lapsed, "
            "CASE WHEN reservation_id IS NULL THEN 0 WHEN reservation_id = '' THEN 1 "
            f"ELSE 2 END FROM {JOURNAL} ORDER BY attempt"
        )
    )


def _past(moment: Any) -> bool | None:
    # A datetime, or what SQLite has for one.
    return None if moment is None else str(moment).startswith("2000")


def time_passes() -> None:
    """The lease runs out, and whatever waits for its time is due."""
    Reservation.objects.exclude(lease_until=None).update(lease_until=PAST)
    Reservation.objects.exclude(next_attempt_at=None).update(next_attempt_at=PAST)


@dataclass
class Report:
    """How much was explored, and where what kind of path ended."""

    paths: int = 0
    states: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    checked: set[Any] = field(default_factory=set, repr=False)


def explore(scenario: Scenario, *, budget: int, sweeps: int = 2) -> Report:
    """Run every path of *scenario* within *budget* and check each one's promises.

    Raises ``Broken`` with the path. Needs a test's transaction around it.
    """
    report = Report()
    customer = opened_account(scenario)
    using = world_alias()
    seen: set[Any] = set()
    # The cheap ones first: no state is met again with more left to spend.
    paths: list[list[Path]] = [[()], *([] for _ in range(budget))]
    while some := next(filter(None, paths), None):
        prefix = some.pop()
        point = savepoint_create(using=using)
        world = World(scenario, customer, sweeps)
        world.connection.inc_thread_sharing()
        try:
            with world.watched():
                _run(world, prefix, budget, seen, paths, report)
        except Broken as exc:
            story = "\n  ".join(world.trace)
            raise Broken(f"{exc}\n{scenario}:\n  {story}") from exc
        finally:
            world.bury()
            world.connection.dec_thread_sharing()
            transaction.savepoint_rollback(point, using=using)
        report.paths += 1
    report.states = len(seen)
    return report


def opened_account(scenario: Scenario) -> Customer:
    client = get_client()
    # The adversary is not there yet.
    Line.world = mock.Mock(running=None, late=[])
    granted = client.grant_credits("customer", scenario.credits + 1, "credits", "start")
    customer_id = granted.grant.customer_id
    client.use_credits(customer_id, 1, "credits", "other-start")
    return Customer.objects.create(external_id="customer", customer_id=customer_id)


def fail_every_statement(scenario: Scenario) -> int:
    """Let each statement of the guard fail once; return how many there are.

    For a ledger in the journal's own database, where row and movement are one
    transaction. Raises ``Broken`` with the statement.
    """
    customer = opened_account(scenario)
    using = world_alias()
    for number in range(1000):
        point = savepoint_create(using=using)
        world = World(scenario, customer, sweeps=0)
        statements: list[str] = []

        def wrapper(
            execute: Any,
            sql: str,
            params: Any,
            many: bool,
            context: Any,
            statements: list[str] = statements,
            number: int = number,
        ) -> Any:
            statements.append(sql)
            if len(statements) == number + 1:
                raise OperationalError("the adversary's")
            return execute(sql, params, many, context)

        try:
            with world.watched():
                with world.connection.execute_wrapper(wrapper):
                    try:
                        world.work()
                    except OperationalError:
                        pass
                world.states = row_states()
                world.check_end()
        except Broken as exc:
            raise Broken(f"{exc}\n{scenario}:\n  {statements[number]}") from exc
        finally:
            transaction.set_rollback(False, using=using)
            transaction.savepoint_rollback(point, using=using)
        if len(statements) <= number:
            return number
    raise Broken("This path does not end.")


def _run(
    world: World,
    prefix: Path,
    budget: int,
    seen: set[Any],
    paths: list[list[Path]],
    report: Report,
) -> None:
    world.start("worker", world.work)
    world._check_state()
    for choice, _ in prefix:
        world.apply(choice)
    path = prefix
    spent = sum(price for _, price in path)
    while True:
        key = world.key()
        if key in seen:
            return
        seen.add(key)
        ordinary, *others = world.options(budget - spent)
        for option in others:
            paths[spent + option[1]].append((*path, option))
        if ordinary[0] == "finish":
            if key[:7] not in report.checked:
                report.checked.add(key[:7])
                world.check_end()
            report.ends.update(world.states.values() or ["no row"])
            return
        path = (*path, ordinary)
        world.apply(ordinary[0])
