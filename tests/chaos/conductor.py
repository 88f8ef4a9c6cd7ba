"""One chaos run: the site's processes, the orders, the kills, and what came of it."""

from __future__ import annotations

import heapq
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import Client

from django_meterly.conf import meterly_settings
from django_meterly.ledger.models import Account, Entry
from django_meterly.models import Reservation
from tests import children
from tests.books import fund
from tests.chaos import notes, promises, work
from tests.chaos.app import app

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

CUSTOMERS, CREDITS = 5, 100_000
#: Of 100 jobs, so many are of each kind.
KINDS = {
    "full": 35,
    "less": 12,
    "more": 12,
    "raises": 8,
    "retries": 10,
    "long": 13,
    "revoked": 10,
}
#: What they settle, at least and at most; the others leave it at what was held.
CHARGES = {
    "less": (1, work.HELD - 1),
    "more": (work.HELD + 1, 2 * work.HELD),
    "long": (1, 2 * work.HELD),
}
#: Every so many seconds, on average, and once at least.
KILLS = {
    "child": 3.0,
    "child stopped": 9.0,
    "sweeper": 8.0,
    "host": 18.0,
    "main": 25.0,
    "warm": 20.0,
    "cold": 20.0,
    "host frozen": 25.0,
    "beat": 30.0,
}
#: Seconds that the drain, and the settling after it, may take.
DRAIN, SETTLE = 90.0, 60.0


@dataclass
class Result:
    """What a run came to: *table* for people, and the promises that were *broken*."""

    table: list[tuple[str, str]]
    broken: list[str]


@dataclass(eq=False)
class Job:
    """An order: what it is, and how it is sent."""

    number: int
    kind: str
    view: str
    countdown: float
    plan: dict[str, Any]


@dataclass(eq=False)
class Child:
    """A process of the site, the leader of a group of its own."""

    process: subprocess.Popen[str]
    stack: ExitStack

    @property
    def pid(self) -> int:
        # Of a process that nobody has waited for: the number is still its own.
        return self.process.pid


class Conductor:
    """Runs the site for *seconds*, and kills what it has started.

    *deaths* is the chance that a process dies at each call to the ledger, and
    *restart* restarts the broker.
    """

    def __init__(
        self,
        folder: Path,
        *,
        jobs: int,
        seconds: float,
        seed: int,
        workers: int,
        deaths: float,
        restart: Callable[[], None] | None,
        visibility_timeout: float,
    ) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._jobs = jobs
        self._seconds = seconds
        self._random = random.Random(seed)
        self._count = workers
        self._restart = restart
        self._visibility_timeout = visibility_timeout
        self._env = {**os.environ, "CHAOS_DEATHS": str(deaths)}
        self._children: set[Child] = set()
        self._workers: list[Child] = []
        self._helpers: dict[str, Child] = {}
        self._stopped: dict[int, Callable[[int, int], None]] = {}
        self._names = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._kills: Counter[str] = Counter()
        self._deaths: dict[int, float] = {}
        self._terminated: set[int] = set()
        self._refused = 0
        self._clients: list[tuple[Client, str]] = []
        self._orders: list[Job] = []

    def run(self) -> Result:
        begun = time.monotonic()
        try:
            self._prepare()
            self._plan()
            self._conduct()
            self._drain()
            drained = time.monotonic() - begun
            self._settle()
        finally:
            for child in list(self._children):
                self._bury(child)
        return self._conclude(drained, time.monotonic() - begun)

    # Its processes

    def _start(self, module: str, *arguments: str) -> Child:
        stack = ExitStack()
        process = stack.enter_context(
            children.started(module, *arguments, env=self._env, log=self._log)
        )
        child = Child(process, stack)
        self._children.add(child)
        return child

    def _start_worker(self) -> None:
        command = ["-A", "tests.chaos.app", "worker", "--pool=prefork"]
        command += ["--concurrency=2", f"--hostname=w{next(self._names)}@%h"]
        command += ["--without-gossip", "--without-mingle", "--loglevel=INFO"]
        self._workers.append(self._start("celery", *command))

    def _start_helper(self, name: str) -> None:
        if name == "sweeper":
            self._helpers[name] = self._start("tests.chaos.sweeper")
            return
        schedule = self._folder / f"beat-{next(self._names)}"
        command = ["-A", "tests.chaos.app", "beat", "--pidfile="]
        self._helpers[name] = self._start("celery", *command, f"--schedule={schedule}")

    def _bury(self, child: Child) -> None:
        """Kill all that is left of a process and its children."""
        if child in self._children:
            self._children.remove(child)
            self._deaths[child.pid] = time.time()
            child.stack.close()

    # The plan

    def _prepare(self) -> None:
        for number in range(CUSTOMERS):
            user = User.objects.create_user(f"user-{number}")
            customer = fund(user, CREDITS)
            client = Client(raise_request_exception=False)
            client.force_login(user)
            self._clients.append((client, customer.external_id))
        for _ in range(self._count):
            self._start_worker()
        for name in ("sweeper", "beat"):
            self._start_helper(name)
        children.wait_until(
            lambda: self._log.read_text().count(" ready.") == self._count, self._log
        )

    def _at(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Let *function* be called that many seconds after the start."""
        event = (seconds, next(self._names), partial(function, *args))
        heapq.heappush(self._events, event)

    def _in(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self._at(time.monotonic() - self._begun + seconds, function, *args)

    def _plan(self) -> None:
        pick = self._random
        for number in range(self._jobs):
            kind = pick.choices(list(KINDS), list(KINDS.values()))[0]
            # The rest is sent by delay().
            view = pick.choices(["order", "order-briefly", ""], [40, 10, 50])[0]
            longest = 2.5 * meterly_settings.LEASE_GRACE
            job = Job(
                number,
                kind,
                view,
                # Until the credits that were held for a moment are gone.
                meterly_settings.LEASE_GRACE + 3 if view == "order-briefly" else 0,
                {
                    "seconds": longest * pick.uniform(0.5, 1)
                    if kind == "long"
                    else pick.uniform(0, 0.6),
                    "linger": pick.uniform(0, 0.3),
                    "charge": CHARGES.get(kind),
                    "raises": kind == "raises",
                    "retries": pick.randint(1, 2) if kind == "retries" else 0,
                },
            )
            self._orders.append(job)
            self._at(pick.uniform(0, 0.9) * self._seconds, self._send, job)
        kills = [name for name in KILLS for _ in range(self._times(name))]
        for name in kills:
            self._at(pick.uniform(0.05, 0.95) * self._seconds, self._kill, name)
        if self._restart is not None:
            at = pick.uniform(0.3, 0.7) * self._seconds
            self._at(at, self._restart_broker)

    def _times(self, name: str) -> int:
        return max(1, round(self._seconds / KILLS[name]))

    def _conduct(self) -> None:
        self._begun = time.monotonic()
        while self._events:
            at, _, function = heapq.heappop(self._events)
            time.sleep(max(0.0, self._begun + at - time.monotonic()))
            function()

    # The orders

    def _send(self, job: Job) -> None:
        client, payer = self._random.choice(self._clients)
        options: dict[str, Any] = {}
        if job.kind == "revoked":
            options["countdown"] = 2 + job.countdown
        elif job.countdown:
            options["countdown"] = job.countdown
        if job.view:
            data = {"payer": payer, "plan": job.plan, "options": options}
            url = f"/{job.view}/{job.number}"
            response = client.post(url, data, content_type="application/json")
            if response.status_code != 200:
                self._refused += 1
                return
            task_id = response.content.decode()
        else:
            task = self._random.choice([work.keeping, work.releasing])
            args = (job.number, payer, job.plan)
            task_id = task.apply_async(args, **options).id
        if job.kind == "revoked":
            # Before it begins, or in the middle of it.
            kill = self._random.random() < 0.5
            self._in(
                options["countdown"] * (1.1 if kill else 0.5),
                self._revoke,
                job,
                task_id,
                kill,
            )

    def _revoke(self, job: Job, task_id: str, kill: bool) -> None:
        if kill:
            self._terminated.add(job.number)
        app.control.revoke(task_id, terminate=kill, signal="SIGKILL")

    # The kills

    def _kill(self, name: str) -> None:
        if not self._workers:
            # All of them are gone just now.
            self._in(1, self._kill, name)
        elif getattr(self, f"_kill_{name.replace(' ', '_')}")() is not False:
            self._kills[name] += 1

    def _busy(self) -> int | None:
        """Return a worker's child that is at work on a job."""
        groups = {worker.pid for worker in self._workers}
        for run in reversed(promises.runs_of(notes.read())):
            if run.state or run.pid in self._deaths or run.pid in self._stopped:
                continue
            # Of ours, and not a number that somebody else has by now.
            with suppress(ProcessLookupError):
                if os.getpgid(run.pid) in groups:
                    return run.pid
        return None

    def _kill_child(self) -> bool:
        pid = self._busy()
        if pid is None:
            return False
        self._deaths[pid] = time.time()
        os.kill(pid, signal.SIGKILL)
        return True

    def _kill_child_stopped(self) -> bool:
        pid = self._busy()
        if pid is None:
            return False
        self._stop(pid, os.kill)
        return True

    def _kill_host_frozen(self) -> None:
        self._stop(self._random.choice(self._workers).pid, os.killpg)

    def _stop(self, pid: int, send: Callable[[int, int], None]) -> None:
        """Stop a process, or its group, for longer than a lease, or much longer."""
        send(pid, signal.SIGSTOP)
        self._stopped[pid] = send
        seconds = meterly_settings.LEASE_GRACE * self._random.uniform(1.3, 4.5)
        # No event: what is stopped may hold a lock that an order waits for.
        timer = threading.Timer(seconds, self._go_on, [pid])
        timer.daemon = True
        timer.start()

    def _go_on(self, pid: int) -> None:
        send = self._stopped.pop(pid, None)
        # Unless it is gone, and the number may be somebody else's.
        with suppress(ProcessLookupError):
            groups = {child.pid for child in list(self._children)}
            if send and os.getpgid(pid) in groups:
                send(pid, signal.SIGCONT)

    def _lose_worker(self) -> Child:
        """Choose a worker, and have it replaced in a moment."""
        worker = self._random.choice(self._workers)
        self._workers.remove(worker)
        self._in(0.5, self._start_worker)
        return worker

    def _kill_host(self) -> None:
        self._bury(self._lose_worker())

    def _kill_main(self) -> None:
        self._signal_main(signal.SIGKILL, 8)

    def _kill_warm(self) -> None:
        self._signal_main(signal.SIGTERM, 15)

    def _kill_cold(self) -> None:
        self._signal_main(signal.SIGQUIT, 8)

    def _signal_main(self, number: int, patience: float) -> None:
        """Signal a worker's main process; end what is left of it later."""
        worker = self._lose_worker()
        if number != signal.SIGTERM:
            self._deaths[worker.pid] = time.time()
        os.kill(worker.pid, number)
        self._in(patience, self._bury, worker)

    def _kill_sweeper(self) -> None:
        self._replace_helper("sweeper")

    def _kill_beat(self) -> None:
        self._replace_helper("beat")

    def _replace_helper(self, name: str) -> None:
        self._bury(self._helpers[name])
        self._start_helper(name)

    def _restart_broker(self) -> None:
        assert self._restart is not None
        self._restart()
        self._kills["broker restarted"] += 1

    # The end

    def _open(self) -> int:
        rows = Reservation.objects.filter(stuck_at=None)
        return rows.filter(state__in=[*OPEN, *PENDING]).count()

    def _drain(self) -> None:
        """Let the workers do what is left, undisturbed, until nothing happens."""
        while self._stopped:
            time.sleep(0.1)
        notes.CALM.touch()
        give_up = time.monotonic() + DRAIN
        # Messages that were lost come back; workers that start look for them at once.
        time.sleep(self._visibility_timeout + 1)
        old = list(self._workers)
        for worker in old:
            self._start_worker()
            os.kill(worker.pid, signal.SIGTERM)
        quiet = 2 * meterly_settings.LEASE_GRACE + 4
        size, since = -1, time.monotonic()
        while time.monotonic() < give_up and time.monotonic() < since + quiet:
            time.sleep(0.5)
            now = notes.NOTES.stat().st_size
            if now != size or self._open():
                size, since = now, time.monotonic()
        for worker in self._workers:
            if worker not in old:
                os.kill(worker.pid, signal.SIGTERM)
        time.sleep(3)
        for worker in self._workers:
            self._bury(worker)

    def _settle(self) -> None:
        """Let leases run out by themselves, and the sweepers finish."""
        self._bury(self._helpers["beat"])
        give_up = time.monotonic() + SETTLE
        while self._open() and time.monotonic() < give_up:
            time.sleep(0.5)
        self._bury(self._helpers["sweeper"])

    def _conclude(self, drained: float, seconds: float) -> Result:
        noted = notes.read()
        for one in noted:
            if one["what"] == "died":
                self._deaths[one["pid"]] = one["at"]
                self._kills["inside, by chance"] += 1
        world = self._look(promises.runs_of(noted))
        broken = promises.broken(world)
        try:
            call_command("meterly_ledger_verify", verbosity=0, stdout=StringIO())
        except (CommandError, SystemExit) as exc:
            broken.append(f"meterly_ledger_verify: {exc}")
        able = [job for job in self._orders if job.kind not in ("raises", "revoked")]
        charged = [job for job in self._orders if world.charged(job.number)]
        if 2 * len(set(able) & set(charged)) < len(able):
            broken.append("less than half of the jobs came to an end: no proof")
        return Result(self._tell(world, charged, drained, seconds), broken)

    def _look(self, runs: list[promises.Run]) -> promises.World:
        rows = [
            promises.Row(
                id=str(row.pk),
                job=_number(row.reference),
                attempt=row.attempt,
                state=row.state,
                fence=row.fence,
                charge=row.charge,
                stuck=row.stuck_at is not None,
            )
            for row in Reservation.objects.order_by("created_at")
        ]
        taken: dict[int, list[tuple[str, int]]] = {}
        for entry in Entry.objects.filter(kind__in=promises.TAKING).order_by("pk"):
            movement = (entry.kind, -entry.balance_delta)
            taken.setdefault(_number(entry.reference), []).append(movement)
        return promises.World(
            runs=runs,
            rows=rows,
            taken=taken,
            deaths=self._deaths,
            terminated=self._terminated,
            lease=meterly_settings.LEASE_GRACE,
            granted=CUSTOMERS * CREDITS,
            accounts=list(Account.objects.values_list("balance", "reserved")),
        )

    def _tell(
        self,
        world: promises.World,
        charged: list[Job],
        drained: float,
        seconds: float,
    ) -> list[tuple[str, str]]:
        table = []
        for kind in KINDS:
            of_kind = {job for job in self._orders if job.kind == kind}
            paid = len(of_kind & set(charged))
            table.append((f"jobs: {kind}", f"{len(of_kind)}, charged {paid}"))
        runs = Counter(run.job for run in world.runs)
        numbers = {job.number for job in charged}
        finished = [run for run in world.runs if run.finished]
        free = {run.job for run in finished} - numbers
        planned = sum(run.state == "RETRY" for run in world.runs)
        able = [job for job in self._orders if job.kind not in ("raises", "revoked")]
        lost = [job for job in able if job.number not in numbers]
        said = self._log.read_text()
        table += [
            ("jobs by a view", str(sum(bool(job.view) for job in self._orders))),
            ("jobs charged", f"{len(charged)} of {len(self._orders)}"),
            ("orders that were refused", str(self._refused)),
            ("finished, killed, and free in the end", str(len(free))),
            ("meant to succeed, and not charged", str(len(lost))),
            ("of these never begun", str(sum(job.number not in runs for job in lost))),
            ("runs", f"{len(world.runs)}, finished {len(finished)}"),
            ("runs again, retries apart", str(len(world.runs) - len(runs) - planned)),
            ("copies that were left alone", str(said.count("is left alone"))),
            (
                "runs that were superseded",
                str(said.count("was claimed by another copy")),
            ),
            ("attempts in the journal", str(len(world.rows))),
            ("taken of a hold, and by a debit", _movements(world)),
            *((f"kills: {name}", str(n)) for name, n in sorted(self._kills.items())),
            ("seconds", f"{seconds:.0f}, drained after {drained:.0f}"),
        ]
        return table


OPEN, PENDING = Reservation.State.open(), Reservation.State.pending()


def _number(reference: str) -> int:
    return int(reference.removeprefix("job-"))


def _movements(world: promises.World) -> str:
    kinds = Counter(kind for taken in world.taken.values() for kind, _ in taken)
    return ", ".join(str(kinds[kind]) for kind in promises.TAKING)
