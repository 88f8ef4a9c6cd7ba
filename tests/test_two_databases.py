"""The embedded ledger in a database of its own, by a project that has two."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.children import PATIENCE, ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_a_ledger_with_a_database_of_its_own_keeps_the_promise(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.two_databases", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
