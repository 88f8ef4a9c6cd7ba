from __future__ import annotations

from django.contrib.auth.base_user import AbstractBaseUser
from django.db import models


class Person(AbstractBaseUser):
    name = models.CharField(max_length=100, unique=True)

    USERNAME_FIELD = "name"

    class Meta:
        app_label = "bare"

    def __str__(self) -> str:
        return self.name
