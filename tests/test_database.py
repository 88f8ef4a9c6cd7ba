from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from django.contrib.auth import get_user_model

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

ROOT = Path(__file__).parent.parent
COUNT_USERS = """
import django
django.setup()
from django.contrib.auth import get_user_model
print(get_user_model().objects.count())
"""


def test_a_child_process_opens_the_database_of_its_test() -> None:
    get_user_model().objects.create(username="alice")
    child = subprocess.run(
        [sys.executable, "-c", COUNT_USERS],
        check=True,
        capture_output=True,
        cwd=ROOT,
        text=True,
    )
    assert child.stdout == "1\n"
