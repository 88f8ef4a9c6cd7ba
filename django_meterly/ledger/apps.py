"""The app ``django_meterly.ledger``, with the label ``meterly_ledger``."""

from __future__ import annotations

from django.apps import AppConfig
from django.db.models.signals import post_migrate, pre_migrate
from django.utils.translation import gettext_lazy as _


class MeterlyLedgerConfig(AppConfig):
    name = "django_meterly.ledger"
    label = "meterly_ledger"
    verbose_name = _("Meterly ledger")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Checks register themselves.
        from . import checks, postgresql, triggers  # noqa: F401

        pre_migrate.connect(postgresql.create_functions_before_migrate, sender=self)
        post_migrate.connect(postgresql.create_functions_after_migrate, sender=self)
        post_migrate.connect(triggers.create_triggers_after_migrate, sender=self)
