"""A short chaos run; ``make chaos`` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import brokers
from tests.children import ROOT

#: More than it takes, drain included; it ends by itself.
TIMEOUT = 300


@pytest.mark.slow("jobs whose workers are killed at random")
@pytest.mark.parametrize("ledger", ["joined", "remote"])
def test_jobs_whose_workers_are_killed_are_charged_once_or_not_at_all(
    ledger: str,
) -> None:
    if not brokers.installed("redis-server"):
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    command = [sys.executable, "-m", "tests.chaos", "--jobs=40", "--seconds=20"]
    command += ["--seed=1", f"--ledger={ledger}"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            said, _ = run.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            # It ends what it has started.
            run.terminate()
            raise
    assert run.returncode == 0, said
    assert "Every promise was kept." in said
