"""The studio's tests, as an example: a project tests work that costs credits.

``python manage.py test --settings=studio.settings_test`` runs them. See
docs/testing.md.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, patch

from django.contrib.auth.models import User
from django.test import TestCase

from django_meterly import get_client, grants
from django_meterly.models import Customer
from django_meterly.testing import (
    assert_books_balance,
    assert_charged,
    assert_not_charged,
    faults,
    override_credits,
    sweep,
)

from . import tasks
from .models import Animation, Poster

TITLE = {"title": "Alps", "style": "suns"}


@override_credits(lambda test: test.user, image_credits=30)
class PosterTests(TestCase):
    def setUp(self) -> None:
        self.user = User.objects.create_user("alice")
        self.client.force_login(self.user)

    def test_a_poster_costs_25_credits(self) -> None:
        with assert_charged(self.user, 25):
            response = self.client.post("/posters/", TITLE)
        self.assertRedirects(response, Poster.objects.get().get_absolute_url())
        assert_books_balance()

    def test_a_poster_that_cannot_be_drawn_is_free(self) -> None:
        with assert_not_charged(self.user):
            response = self.client.post("/posters/", {"title": "", "style": "suns"})
        assert response.status_code == 422

    def test_the_second_poster_is_refused(self) -> None:
        with assert_charged(self.user, 25):
            self.client.post("/posters/", TITLE)
            response = self.client.post("/posters/", TITLE)
        self.assertContains(response, "/credits/", status_code=402)
        assert Poster.objects.count() == 1

    def test_a_commit_that_is_lost_is_made_up_for(self) -> None:
        with assert_charged(self.user, 25), faults(commit_reservation=["lost"]):
            self.client.post("/posters/", TITLE)
            sweep()
        assert_books_balance()

    def test_nobody_pays_for_an_outage(self) -> None:
        with assert_not_charged(self.user), faults("unsent"):
            response = self.client.post("/posters/", TITLE)
        assert response.status_code == 503


class AnimationTests(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = User.objects.create_user("alice")
        cls.poster = Poster.objects.create(
            owner=cls.user, title="Alps", reference="poster-1"
        )
        grants.grant(
            get_client(),
            Customer.objects.for_owner(cls.user),
            30,
            "render_seconds",
            reason="a test",
            reference="test",
        )

    def animate(self) -> Any:
        self.client.force_login(self.user)
        return self.client.post(f"/posters/{self.poster.pk}/animate/")

    def test_an_animation_costs_the_seconds_that_it_takes(self) -> None:
        clock = Mock(monotonic=Mock(side_effect=[0.0, 6.5]))
        with (
            patch.object(tasks, "FRAMES", 2),
            patch.object(tasks, "time", clock),
            assert_charged(self.user, 7, unit="render_seconds"),
        ):
            self.animate()
        assert Animation.objects.get().frames_done == 2
        assert_books_balance()

    def test_an_animation_that_fails_is_free(self) -> None:
        Poster.objects.update(style="unknown")
        with assert_not_charged(self.user):
            self.animate()
        assert Animation.objects.get().frames_done == 0
        assert_books_balance()
