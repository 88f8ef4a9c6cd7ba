from __future__ import annotations

import pytest
from django.core.management import call_command


@pytest.mark.database
@pytest.mark.django_db
def test_models_and_migrations_agree() -> None:
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)
