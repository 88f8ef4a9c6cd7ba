from __future__ import annotations

from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import include, path
from django.views.generic import RedirectView

from . import views

urlpatterns = [
    path("", views.studio, name="studio"),
    path("posters/", views.create_poster, name="create-poster"),
    path("posters/<int:pk>/", views.poster, name="poster"),
    path("posters/<int:pk>/animate/", views.animate, name="animate"),
    path("posters/<int:pk>/<str:name>", views.poster_file, name="poster-file"),
    path("animations/<int:pk>/", views.animation, name="animation"),
    path("animations/<int:pk>/poster.png", views.animation_file, name="animation-file"),
    path("styles/<str:style>.png", views.style_sample, name="style-sample"),
    path("credits/", views.credits_page, name="credits"),
    path("kinds/", include("studio.kinds")),
    path(
        "log-in/",
        LoginView.as_view(redirect_authenticated_user=True),
        name="login",
    ),
    path("log-out/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
    # The ledger's REST API. Other services set their base URL to this site's /ledger.
    path("ledger/", include("django_meterly.ledger.urls")),
    path("favicon.ico", RedirectView.as_view(url="/static/studio/icon.svg")),
]
