from __future__ import annotations

import datetime as dt
from typing import Any

import environ
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.utils.translation import gettext_lazy

from django_meterly import MeterlyClient, get_client
from django_meterly.checks import check_settings
from django_meterly.conf import from_env, meterly_settings
from django_meterly.transports import HttpTransport


class Environ(environ.Env):
    """An environment of our own, not the process's."""


def environment(**variables: str) -> environ.Env:
    env = Environ()
    env.ENVIRON = variables
    return env


def test_settings_are_read_anew_each_time(settings: Any) -> None:
    settings.METERLY = {"DEADLINE": 1}
    assert meterly_settings.DEADLINE == 1
    settings.METERLY = {"DEADLINE": dt.timedelta(seconds=2)}
    assert meterly_settings.DEADLINE == 2
    del settings.METERLY
    assert meterly_settings.DEADLINE == 8


def test_unknown_names_fail_with_a_suggestion(settings: Any) -> None:
    settings.METERLY = {"API_KEYS": "x"}
    with pytest.raises(ImproperlyConfigured, match="Did you mean 'API_KEY'"):
        _ = meterly_settings.DEADLINE
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = meterly_settings.NO_SUCH


@pytest.mark.parametrize("value", [0, -1, "8", True, None])
def test_durations_are_positive_seconds(settings: Any, value: Any) -> None:
    settings.METERLY = {"DEADLINE": value}
    with pytest.raises(ImproperlyConfigured, match="positive number of seconds"):
        _ = meterly_settings.DEADLINE


def test_metrly_must_be_a_dict(settings: Any) -> None:
    settings.METERLY = []
    with pytest.raises(ImproperlyConfigured, match="must be a dict, not list"):
        _ = meterly_settings.DEADLINE


def test_environment_fills_the_settings() -> None:
    assert from_env(
        environment(
            METERLY_API_KEY="mk_test_x",
            METERLY_DEADLINE="2.5",
            METERLY_MAX_SETTLE_ATTEMPTS="3",
            METERLY_ALLOW_INSECURE_HTTP="on",
            METERLY_MAX_ATTEMPTS="5",
            METERLY_LOW_BALANCE="tokens=50;images=5",
            METERLY_SIGNER="shop.signing.Signer",
            OTHER="x",
        )
    ) == {
        "API_KEY": "mk_test_x",
        "DEADLINE": 2.5,
        "MAX_SETTLE_ATTEMPTS": 3,
        "ALLOW_INSECURE_HTTP": True,
        "MAX_ATTEMPTS": 5,
        "LOW_BALANCE": {"tokens": 50, "images": 5},
        "SIGNER": "shop.signing.Signer",
    }


def test_environment_is_refused_with_the_remedy() -> None:
    with pytest.raises(ImproperlyConfigured, match="Did you mean 'API_KEY'"):
        from_env(environment(METERLY_API_KEYY="x"))
    with pytest.raises(ImproperlyConfigured, match="METERLY_DEADLINE must be a float"):
        from_env(environment(METERLY_DEADLINE="soon"))
    for wrong in ("tokens", "tokens=few"):
        with pytest.raises(ImproperlyConfigured, match="LOW_BALANCE must be a dict"):
            from_env(environment(METERLY_LOW_BALANCE=wrong))


def test_client_follows_the_settings(settings: Any) -> None:
    first = get_client()
    assert get_client() is first
    settings.METERLY = {
        "TRANSPORT": "django_meterly.transports.HttpTransport",
        "API_KEY": "mk_test_" + "x" * 32,
        "BASE_URL": "http://127.0.0.1:1",
    }
    second = get_client()
    assert isinstance(second.transport, HttpTransport)
    assert get_client() is second
    # Changed in place, too.
    settings.METERLY["BASE_URL"] = "http://127.0.0.1:2"
    assert get_client() is not second


def test_client_takes_a_key_or_a_transport() -> None:
    with pytest.raises(TypeError, match="not both"):
        MeterlyClient("mk_test_x", transport=get_client().transport)


@pytest.mark.parametrize(
    "url",
    [
        "/credits/",
        "/",
        "/credits?from=402&x=1#buy",
        "/crédits/",
        "https://pay.example.com/credits",
        "http://127.0.0.1:8000/credits",
        "HTTPS://pay.example.com",
        gettext_lazy("/credits/"),
    ],
)
def test_top_up_url_may_be_a_path_or_an_http_url(settings: Any, url: Any) -> None:
    settings.METERLY = {"TOP_UP_URL": url}
    assert str(url) == meterly_settings.TOP_UP_URL
    assert not check_settings_errors()


@pytest.mark.parametrize("url", [None, ""])
def test_no_top_up_url_is_none(settings: Any, url: Any) -> None:
    settings.METERLY = {"TOP_UP_URL": url}
    assert meterly_settings.TOP_UP_URL is None


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "JavaScript:alert(1)",
        " javascript:alert(1)",
        "\x01javascript:alert(1)",
        "java\nscript:alert(1)",
        "data:text/html,x",
        "vbscript:x",
        "file:///etc/passwd",
        "mailto:a@example.com",
        "ftp://example.com/",
        "blob:https://example.com/x",
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        " /credits/",
        "/credits/ ",
        "/cre dits/",
        "/credits/\r\nSet-Cookie: x",
        "/credits/\x00",
        "/credits/\u202e",
        "/credits/\u2028",
        "https://",
        "https:evil.example",
        "https:/evil.example",
        "https:///evil.example",
        "https://[",
        "https://exa mple.com",
        "https:\\\\evil.example",
        "credits/",
        "example.com",
        "?top-up",
        "#top-up",
        5,
        ["/credits/"],
    ],
)
def test_another_top_up_url_is_refused_where_it_is_read(
    settings: Any, url: Any
) -> None:
    settings.METERLY = {"TOP_UP_URL": url}
    with pytest.raises(ImproperlyConfigured, match=r"'TOP_UP_URL'.* must be an http"):
        _ = meterly_settings.TOP_UP_URL
    (error,) = check_settings_errors()
    assert error.id == "meterly.E003"
    assert "TOP_UP_URL" in error.msg


def check_settings_errors() -> list[Any]:
    errors = [*check_settings()]
    return [error for error in errors if error.id == "meterly.E003"]
