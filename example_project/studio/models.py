"""What the studio sells: posters, and animated versions of them.

A row has the *reference* of the reservation that paid for it. States and costs are read
from the reservation, and are not stored here.
"""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.urls import reverse

from django_meterly.models import Reservation

from .drawing import STYLES

State = Reservation.State
#: Frames of an animation, one loop.
FRAMES = 24


class Poster(models.Model):
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="posters"
    )
    title = models.CharField(max_length=80)
    style = models.CharField(
        max_length=20,
        choices=[(name, style.label) for name, style in STYLES.items()],
        default="suns",
    )
    reference = models.CharField(max_length=40, unique=True)
    image = models.FileField(upload_to="posters")
    thumbnail = models.FileField(upload_to="posters")
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.title

    def get_absolute_url(self) -> str:
        return reverse("poster", args=[self.pk])


class Animation(models.Model):
    poster = models.ForeignKey(
        Poster, on_delete=models.CASCADE, related_name="animations"
    )
    reference = models.CharField(max_length=40, unique=True)
    dies_half_way = models.BooleanField(default=False)
    frames_done = models.PositiveSmallIntegerField(default=0)
    image = models.FileField(upload_to="animations", blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.poster}, animated"

    def get_absolute_url(self) -> str:
        return reverse("animation", args=[self.pk])

    def reservation(self) -> Reservation | None:
        """Return the reservation of the latest attempt, if there was one."""
        rows = Reservation.objects.filter(reference=self.reference)
        return rows.order_by("-attempt").first()

    @staticmethod
    def stage(reservation: Reservation | None) -> str:
        """Return the progress of a job with this *reservation* in one word."""
        if reservation is None or reservation.is_offered:
            return "waiting"
        if reservation.state == State.RELEASED:
            return "lost" if reservation.lapsed else "failed"
        return {
            State.DENIED: "denied",
            State.FAILED: "failed",
            State.COMMIT_PENDING: "done",
            State.COMMITTED: "done",
            State.UNBILLED: "done",
        }.get(State(reservation.state), "rendering")
