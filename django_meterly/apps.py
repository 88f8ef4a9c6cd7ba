from __future__ import annotations

from django.apps import AppConfig
from django.core.signals import got_request_exception
from django.utils.translation import gettext_lazy as _


class MeterlyConfig(AppConfig):
    name = "django_meterly"
    label = "meterly"
    verbose_name = _("Meterly credits")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Importing the checks registers them.
        from . import checks  # noqa: F401
        from .middleware import explain_unanswered
        from .models import replace_missing_owner_model

        replace_missing_owner_model()
        got_request_exception.connect(explain_unanswered)
