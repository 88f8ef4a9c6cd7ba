"""``path("credits/", include("django_meterly.rest_framework.urls"))``."""

from __future__ import annotations

from django.urls import path

from .views import BalancesView, BalanceView

app_name = "meterly"
urlpatterns = [
    path("balances/", BalancesView.as_view(), name="balances"),
    path("balances/<str:unit>/", BalanceView.as_view(), name="balance"),
]
