from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from tests import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("ledger/", include("django_meterly.ledger.urls")),
    *[
        path(f"{view.__name__}/", view)
        for view in (
            views.paid,
            views.settles,
            views.raises,
            views.breaks_at_commit,
            views.breaks_after_commit,
            views.rolls_back,
            views.loses_connection,
            views.template,
            views.stream,
            views.nested,
            views.keyed,
            views.reading,
            views.exempt,
            views.atomic,
        )
    ],
]
