from __future__ import annotations

from typing import Any

from django.contrib.auth.models import AbstractUser, UserManager
from django.db import models


class Team(models.Model):
    slug = models.SlugField(unique=True)

    def __str__(self) -> str:
        return self.slug


class Members(UserManager["Member"]):
    def create_superuser(self, email: Any, **options: Any) -> Member:  # type: ignore[override]
        options.pop("username", None)
        team, _ = Team.objects.get_or_create(slug="blue")
        return super().create_superuser(email, email, team=team, **options)


class Member(AbstractUser):
    """Logs in by e-mail address, and belongs to a team at most."""

    email = models.EmailField(unique=True)
    team = models.ForeignKey(Team, models.SET_NULL, null=True, related_name="members")
    objects = Members()

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS = ["username"]


def team_of(request: Any) -> Team | None:
    return getattr(request.user, "team", None)


def slug(team: Team) -> str:
    return f"team-{team.slug}"
