"""Message brokers for the tests: real servers, and a wire to them that can break.

Each lives in a folder of its own, listens on 127.0.0.1 only, and is gone when the
tests have ended. Redis and RabbitMQ are those that are installed on this machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.database import _system_path, _wait_for, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator


def installed(server: str) -> str | None:
    """Return the path of a *server*, ``redis-server`` or ``rabbitmq-server``."""
    if server == "rabbitmq-server":
        # The one on the PATH wants to run as a user of its own.
        found = sorted(Path("/usr/lib/rabbitmq/lib").glob("*/sbin/rabbitmq-server"))
        return str(found[-1]) if found else None
    return shutil.which(server, path=_system_path())


@contextmanager
def _running(
    command: list[str], port: int, folder: Path, env: dict[str, str] | None = None
) -> Iterator[None]:
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_for(server, port)
        yield
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def redis(folder: Path, port: int = 0) -> Iterator[str]:
    """Run Redis in *folder* and return its URL.

    On a *port* of the caller's it may be started again, and has what it had.
    """
    durable = "yes" if port else "no"
    port = port or free_port()
    command = [str(installed("redis-server")), "--port", str(port)]
    command += ["--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command += ["--appendonly", durable]
    with _running(command, port, folder):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def rabbitmq(folder: Path) -> Iterator[str]:
    """Run RabbitMQ in *folder* and return its URL."""
    port, names = free_port(), free_port()
    plugins = folder / "plugins"
    plugins.write_text("[].")
    env = {
        "HOME": str(folder),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(names),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_NODENAME": f"meterly{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        # A node that has nothing else to do need not spin for it.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
    }
    try:
        with _running([str(installed("rabbitmq-server"))], port, folder, env):
            yield f"amqp://guest:guest@127.0.0.1:{port}//"
    finally:
        # The node's own name server outlives it.
        subprocess.run(
            ["epmd", "-port", str(names), "-kill"],
            env={**os.environ, **env},
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


class Wire:
    """A port that leads to another one, until it is ``cut``; then anew."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection that there is."""
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
