from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand
from django.utils.crypto import get_random_string


class Command(BaseCommand):
    help = "Create alice and bob, who buy posters, and admin; print their passwords."

    def handle(self, **options: Any) -> None:
        users = get_user_model().objects
        for name, create in (
            ("alice", users.create_user),
            ("bob", users.create_user),
            ("admin", users.create_superuser),
        ):
            password = get_random_string(10, "abcdefghijkmnpqrstuvwxyz23456789")
            create(name, password=password)
            self.stdout.write(f"{name} {password}")
