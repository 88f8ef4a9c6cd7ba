"""What a refused request is answered, to browsers and to programs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import AnonymousUser
from django.contrib.auth.views import redirect_to_login
from django.http import HttpResponse
from django.test import RequestFactory, override_settings
from django.utils.translation import override

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    meterly_guard,
)
from django_meterly.errors import MeterlyInvalidKeyError
from django_meterly.views import responses

if TYPE_CHECKING:
    from pathlib import Path

HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PROBLEM = "application/problem+json"


def short(available: int = 5, reserved: int = 0) -> MeterlyInsufficientCreditsError:
    return MeterlyInsufficientCreditsError(
        details={
            "required": 25,
            "available": available,
            "reserved": reserved,
            "unit": "image_credits",
        }
    )


CASES = [
    (short(), 402, "insufficient_credits"),
    (short(reserved=40), 402, "insufficient_credits"),
    # A project's own, which says nothing about its unit.
    (MeterlyInsufficientCreditsError(), 402, "insufficient_credits"),
    (MeterlyUnavailableError(retry_after=7), 503, "unavailable"),
    (MeterlyDuplicateError(state="reserved", in_progress=True), 409, "duplicate"),
    (MeterlyDuplicateError(state="committed", reference="poster-7"), 409, "duplicate"),
    (MeterlyIdempotencyMismatchError(), 422, "idempotency_mismatch"),
    (MeterlyInvalidKeyError(), 400, "invalid_idempotency_key"),
]
every_case = pytest.mark.parametrize(("exc", "status", "code"), CASES)


def answer(exc: Any, accept: str | None = None, **headers: str) -> HttpResponse:
    if accept is not None:
        headers["Accept"] = accept
    return responses.render(RequestFactory().post("/draw/", headers=headers), exc)


@every_case
def test_programs_get_a_problem(exc: Any, status: int, code: str) -> None:
    response = answer(exc, "application/json")
    assert response.status_code == status
    assert response["Content-Type"] == PROBLEM
    assert response["Cache-Control"] == "private, no-store"
    assert "Accept" in response["Vary"]
    problem = json.loads(response.content)
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == "about:blank"
    assert problem["title"]
    assert problem["detail"]


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/plain, */*", False),
        (PROBLEM, False),
        ("image/png", False),
        ("", False),
        ("nonsense", False),
        ("text/html", True),
        (HTML, True),
        ("text/html;q=0.5, application/json", False),
        ("text/html, application/json;q=0.5", True),
    ],
)
def test_only_who_asks_for_html_gets_it(accept: str | None, html: bool) -> None:
    content_type = answer(short(), accept)["Content-Type"]
    assert content_type == ("text/html; charset=utf-8" if html else PROBLEM)


class Page(HTMLParser):
    """The tags of a page, and whether they were closed in order."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@every_case
def test_browsers_get_a_page_that_stands_alone(
    exc: Any, status: int, code: str
) -> None:
    response = answer(exc, HTML)
    assert response.status_code == status
    html = response.content.decode()
    page = Page(html)
    (root,) = page.all("html")
    assert root["lang"] == "en-us"
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("title")) == 1
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in html
    # Nothing from anywhere else, and a way back.
    assert not page.all("link")
    assert not page.all("script")
    assert not page.all("img")
    assert "url(" not in html
    assert [a["href"] for a in page.all("a")] == ["/"]


def test_a_402_tells_out_of_credits_from_credits_in_use() -> None:
    with override_settings(METERLY={"TOP_UP_URL": "/credits/?from=402&x=1"}):
        out = answer(short(), HTML).content.decode()
        held = answer(short(reserved=40), HTML).content.decode()
    assert "Not enough credits" in out
    assert "This needs 25 image_credits, and 5 are available." in out
    assert "Held by running work" not in out
    assert "Your credits are in use" in held
    assert "Try again when it is done" in held
    assert re.search(r"Held by running work</dt><dd>40 image_credits</dd>", held)
    for html in (out, held):
        assert '<a class="button" href="/credits/?from=402&amp;x=1">' in html


def test_a_503_and_what_is_in_progress_say_when_to_come_back() -> None:
    for accept in (HTML, PROBLEM):
        unavailable = answer(MeterlyUnavailableError(retry_after=7), accept)
        assert unavailable["Retry-After"] == "7"
        running = answer(MeterlyDuplicateError(in_progress=True), accept)
        assert running["Retry-After"] == "5"
        assert "Retry-After" not in answer(MeterlyDuplicateError(), accept)


def test_a_finished_request_is_named_by_its_reference() -> None:
    exc = MeterlyDuplicateError(state="committed", reference="<poster>-7")
    assert "<dd>&lt;poster&gt;-7</dd>" in answer(exc, HTML).content.decode()
    assert "<dl>" not in answer(MeterlyDuplicateError(), HTML).content.decode()


@pytest.mark.parametrize(
    ("referer", "back"),
    [
        (
            "http://testserver/posters/new/?a=1&b=2",
            "http://testserver/posters/new/?a=1&amp;b=2",
        ),
        ("https://elsewhere.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("//elsewhere.example/", "/"),
        ("", "/"),
    ],
)
def test_the_way_back_never_leaves_the_site(referer: str, back: str) -> None:
    html = answer(short(), HTML, Referer=referer).content.decode()
    assert f'<a href="{back}">Go back</a>' in html


def test_a_project_overrides_a_page_block_by_block(settings: Any) -> None:
    blocks = ("title", "style", "heading", "detail", "more", "actions")
    (config,) = settings.TEMPLATES
    page = '{% extends "meterly/base.html" %}' + "".join(
        f"{{% block {name} %}}[{name}]{{% endblock %}}" for name in blocks
    )
    settings.TEMPLATES = [
        {
            **config,
            "APP_DIRS": False,
            "OPTIONS": {
                **config["OPTIONS"],
                "loaders": [
                    (
                        "django.template.loaders.locmem.Loader",
                        {"meterly/503.html": page},
                    ),
                    "django.template.loaders.app_directories.Loader",
                ],
            },
        }
    ]
    html = answer(MeterlyUnavailableError(), HTML).content.decode()
    for name in blocks:
        assert html.count(f"[{name}]") == 1
    Page(html)


def test_a_content_security_policys_nonce_is_used(settings: Any) -> None:
    (config,) = settings.TEMPLATES
    processors = [*config["OPTIONS"]["context_processors"], f"{__name__}.csp"]
    options = {**config["OPTIONS"], "context_processors": processors}
    settings.TEMPLATES = [{**config, "OPTIONS": options}]
    assert '<style nonce="n0">' in answer(short(), HTML).content.decode()


def csp(request: Any) -> dict[str, str]:
    """What Django 6's context processor of this name gives."""
    return {"csp_nonce": "n0"}


@pytest.mark.django_db
@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_nobody_logged_in_is_a_401_for_programs(accept: str | None) -> None:
    headers = {"Accept": accept} if accept else {}
    request = RequestFactory().post("/", headers=headers)
    request.user = AnonymousUser()
    response = meterly_guard("image_credits", 25)(lambda request: HttpResponse())(
        request
    )
    assert response.status_code == 401
    assert response["Content-Type"] == PROBLEM


DJANGO = "django.template.backends.django.DjangoTemplates"
JINJA = {"BACKEND": "django.template.backends.jinja2.Jinja2", "DIRS": []}
ENGINES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "jinja2": [{**JINJA, "APP_DIRS": True}],
    "no app_dirs": [{"BACKEND": DJANGO}],
    "no app_dirs, beside jinja2": [JINJA, {"BACKEND": DJANGO}],
    "another name": [{"BACKEND": DJANGO, "NAME": "web", "APP_DIRS": True}],
    "two of django": [
        {"BACKEND": DJANGO, "NAME": "mail"},
        {"BACKEND": DJANGO, "NAME": "web", "APP_DIRS": True},
    ],
    "two without app_dirs": [
        {"BACKEND": DJANGO, "NAME": "mail"},
        {"BACKEND": DJANGO, "NAME": "web"},
    ],
    "loaders": [
        {
            "BACKEND": DJANGO,
            "OPTIONS": {"loaders": [("django.template.loaders.locmem.Loader", {})]},
        }
    ],
    "strict": [{"BACKEND": DJANGO, "OPTIONS": {"string_if_invalid": "MISSING"}}],
}
every_engine = pytest.mark.parametrize("templates", ENGINES.values(), ids=ENGINES)


@every_engine
@every_case
def test_f70_pages_need_no_engine_of_the_project(
    settings: Any, templates: Any, exc: Any, status: int, code: str
) -> None:
    settings.TEMPLATES = templates
    response = answer(exc, HTML)
    assert response.status_code == status
    page = response.content.decode()
    assert responses.problem(exc).title in page
    assert "</html>" in page
    assert "MISSING" not in page


@every_engine
def test_f70_a_page_in_another_language_needs_none_either(
    settings: Any, templates: Any
) -> None:
    settings.TEMPLATES = templates
    with override("de"):
        assert "Zurück" in answer(short(), HTML).content.decode()


@pytest.mark.parametrize(
    "apart", [{}, {"APP_DIRS": True}, {"NAME": "web"}], ids=lambda apart: str(apart)
)
def test_f70_a_projects_base_is_that_of_our_pages_in_any_engine(
    settings: Any, tmp_path: Path, apart: Any
) -> None:
    (tmp_path / "meterly").mkdir()
    (tmp_path / "meterly" / "base.html").write_text(
        "<title>Posters</title>{% block more %}{% endblock %}"
    )
    settings.TEMPLATES = [{"BACKEND": DJANGO, "DIRS": [tmp_path], **apart}]
    page = answer(short(), HTML).content.decode()
    assert "<title>Posters</title>" in page
    assert "25 image_credits" in page


def test_f70_a_project_overrides_a_page_by_jinja2(
    settings: Any, tmp_path: Path
) -> None:
    (tmp_path / "meterly").mkdir()
    (tmp_path / "meterly" / "402.html").write_text("{{ required ** 2 }}, says jinja2")
    settings.TEMPLATES = [{**JINJA, "DIRS": [tmp_path]}]
    assert answer(short(), HTML).content == b"625, says jinja2"


@pytest.mark.parametrize(
    ("login_url", "location"),
    [
        ("/in/", "/in/?next=/draw/%3Fpage%3D2"),
        ("/in/?by=mail", "/in/?by=mail&next=/draw/%3Fpage%3D2"),
        ("https://sso.example/in", "https://sso.example/in?next=/draw/%3Fpage%3D2"),
        ("admin:login", "/admin/login/?next=/draw/%3Fpage%3D2"),
    ],
)
def test_a_browser_is_sent_to_log_in(
    settings: Any, login_url: str, location: str
) -> None:
    settings.LOGIN_URL = login_url
    request = RequestFactory().post("/draw/?page=2", headers={"Accept": HTML})
    assert responses.nobody_pays(request)["Location"] == location
    theirs = redirect_to_login(request.get_full_path())
    assert location == theirs["Location"]
