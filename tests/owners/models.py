"""Owners of customers: with keys of every kind, and of more than one table."""

from __future__ import annotations

import uuid
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.db import models


class UuidTeam(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)

    def __str__(self) -> str:
        raise RuntimeError("this model does not tell its name")


class NamedTeam(models.Model):
    name = models.CharField(max_length=200, primary_key=True)

    def __str__(self) -> str:
        return self.name


class NumberedTeam(models.Model):
    number = models.IntegerField(primary_key=True)

    def __str__(self) -> str:
        return str(self.number)


class Profile(models.Model):
    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, primary_key=True
    )

    def __str__(self) -> str:
        return f"profile {self.pk}"


class ProxyUser(User):
    class Meta:
        proxy = True


class Person(models.Model):
    def __str__(self) -> str:
        return f"person {self.pk}"


class Member(Person):
    """A child whose key is its parent's."""


class Club(Person):
    """A child whose key is its own, so that its ``pk`` is not its parent's."""

    person = models.OneToOneField(
        Person, on_delete=models.CASCADE, parent_link=True, related_name="+"
    )
    code = models.CharField(max_length=20, primary_key=True)


def new(name: str, number: int) -> Any:
    """Save an instance of the model *name*; a number makes one key again and again."""
    match name:
        case "UuidTeam":
            return UuidTeam.objects.create(pk=uuid.UUID(int=number))
        case "NamedTeam":
            # Long, and other than ASCII.
            return NamedTeam.objects.create(pk="é ~" * 60 + f" {number}")
        case "NumberedTeam":
            # From 0 on.
            return NumberedTeam.objects.create(pk=number - 1)
        case "Profile":
            user, _ = User.objects.get_or_create(pk=number, username=str(number))
            return Profile.objects.create(user=user)
        case "ProxyUser":
            user = User.objects.create(pk=number, username=str(number))
            return user if number % 2 else ProxyUser.objects.get(pk=number)
        case "Member":
            return Member.objects.create(pk=number)
        case "Person":
            return Club.objects.create(person_id=number, id=number, code=f"c{number}")
    raise LookupError(name)
