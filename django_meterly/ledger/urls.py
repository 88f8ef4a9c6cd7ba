"""The ledger's REST API: ``path("ledger/", include("django_meterly.ledger.urls"))``.

The paths are those of ``ROUTES``, the wire's table of calls.
"""

from __future__ import annotations

import re

from django.urls import re_path

from ..transports.base import ROUTES
from .api.views import DocumentView, HealthView, OperationView, UnknownPathView

app_name = "meterly_ledger"

_operations: dict[str, dict[str, str]] = {}
for _operation, (_method, _path) in ROUTES.items():
    _operations.setdefault(_path, {})[_method] = _operation


def _pattern(path: str) -> str:
    ids = re.sub(r"{(\w+)}", r"(?P<\1>[A-Za-z0-9_-]+)", path.removeprefix("/"))
    return rf"^{ids}\Z"


urlpatterns = [
    *(
        re_path(
            _pattern(path),
            OperationView.as_view(operations=operations),
            name=next(iter(operations.values())),
        )
        for path, operations in _operations.items()
    ),
    re_path(r"^health\Z", HealthView.as_view(), name="health"),
    re_path(r"^openapi\.json\Z", DocumentView.as_view(), name="openapi"),
    re_path(r"^v1(?:/|\Z)", UnknownPathView.as_view()),
]
