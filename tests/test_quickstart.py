from __future__ import annotations

from typing import TYPE_CHECKING

from tests import quickstart

if TYPE_CHECKING:
    from pathlib import Path


def test_the_quickstart_as_it_stands_ends_with_charged_work(tmp_path: Path) -> None:
    project = quickstart.type_in(tmp_path)
    quickstart.try_out(project)
