from __future__ import annotations

import datetime as dt
import json
import os
from collections import UserDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import environ
import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.urls import reverse_lazy
from django.utils.functional import lazy
from django.utils.translation import gettext_lazy
from environ import FileAwareEnv
from environ.fileaware_mapping import FileAwareMapping

import django_meterly.transports
from django_meterly import MeterlyClient, checks, conf, get_client
from django_meterly.checks import check_settings
from django_meterly.conf import DEFAULTS, FUNCTIONS, from_env, meterly_settings
from django_meterly.resolvers import external_id
from django_meterly.transports import HttpTransport
from django_meterly.transports.signing import BearerSigner, Secret
from django_meterly.wire import shown
from tests.test_checks import found

# Some checks look into the database.
pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def ignored(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What ``from_env`` has ignored in this test."""
    found: dict[str, str] = {}
    monkeypatch.setattr(conf, "ignored_variables", found)
    monkeypatch.setattr(checks, "ignored_variables", found)
    return found


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


@pytest.mark.parametrize(
    "value",
    [None, [], "x", 5, object(), dict, set(), MappingProxyType({}), UserDict()],
    ids=lambda value: type(value).__name__,
)
def test_meterly_must_be_a_dict(settings: Any, value: Any) -> None:
    settings.METERLY = value
    kind = type(value).__name__
    with pytest.raises(ImproperlyConfigured, match=f"must be a dict, not {kind}"):
        _ = meterly_settings.DEADLINE
    with pytest.raises(ImproperlyConfigured, match=f"must be a dict, not {kind}"):
        get_client()
    messages = found(databases=["default"])
    assert [each.id for each in messages] == ["meterly.E001"]


@pytest.mark.parametrize(
    "name", [1, None, (), "api_key", "API-KEY", "", b"API_KEY", 10**5000], ids=shown
)
def test_every_unknown_name_is_an_error_of_its_own(settings: Any, name: Any) -> None:
    settings.METERLY = {name: "x", "NO_SUCH": 1}
    with pytest.raises(ImproperlyConfigured, match="There is no setting METERLY"):
        _ = meterly_settings.DEADLINE
    errors = found(databases=["default"])
    assert [error.id for error in errors] == ["meterly.E002"] * 2
    assert f"METERLY[{shown(name)}]" in errors[0].msg


NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**5000
WRONG: list[Any] = [
    *(None, "", " ", "x", "x.y", "x.y.z", ".", "..", ".x", "\x00", "x" * 100_000),
    *(-1, 0, True, False, 1.5, NAN, INFINITY, -INFINITY, HUGE, 1e300),
    *([], {}, (), set(), object(), object, b"x", {"x": None}, {1: 1}, ["x"]),
    *(dt.timedelta(0), dt.timedelta(seconds=-1), dt.timedelta.max, json, len),
    *(django_meterly.transports, "django_meterly.transports", "json.dumps"),
    *(gettext_lazy("x"), dt.datetime.max, Path("x"), lambda: "x", 2**63),
]
#: What is not wrong: the setting and the values that it takes.
FINE: dict[str, list[Any]] = {
    "API_KEY": [None, "", "x", "x.y", "x.y.z", ".", "..", ".x", "x" * 100_000],
    "SIGNER": [None, object, len, "json.dumps", WRONG[-2]],
    "CUSTOMER_RESOLVER": [len, "json.dumps"],
    "EXTERNAL_ID": [len, "json.dumps"],
    "ALLOW_INSECURE_HTTP": [True, False],
    "DEFAULT_UNIT": [None, "x", "x.y", "x.y.z", "django_meterly.transports"],
    "CUSTOMER_MODEL": [None],
    "GUARDED_VIEWS": [{}],
    "LOW_BALANCE": [{}],
    "TOP_UP_URL": [None, ""],
    "UNAVAILABLE_CAP": [0],
    "CONNECT_TIMEOUT": [1.5],
    "READ_TIMEOUT": [1.5],
    "DEADLINE": [1.5],
    "LOW_BALANCE_COOLDOWN": [1.5],
    "LEASE_GRACE": [1.5],
}
FINE["UNITS"] = [{}]
FINE["DEFAULT_UNIT"] += ["json.dumps"]
FINE["API_KEY"] += ["django_meterly.transports", "json.dumps"]


def is_fine(name: str, value: Any) -> bool:
    return any(
        value is each or (type(value) is type(each) and value == each)
        for each in FINE.get(name, [])
    )


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", list(DEFAULTS))
def test_a_wrong_value_is_an_error_that_names_the_setting(
    settings: Any, name: str
) -> None:
    project = settings.METERLY
    for value in WRONG:
        settings.METERLY = {**project, name: value}
        shown = repr(value)[:100] if value is not HUGE else "huge"
        errors = [each for each in found() if each.is_serious()]
        if is_fine(name, value):
            assert errors == [], shown
            getattr(meterly_settings, name)
            continue
        assert errors, shown
        # Options of guarded views have a check of their own.
        if name == "GUARDED_VIEWS" and isinstance(value, dict):
            continue
        # Signatures are for the check, not for every request.
        if name in ("CUSTOMER_RESOLVER", "EXTERNAL_ID") and callable(value):
            assert [error.id for error in errors] == ["meterly.E004"], shown
            continue
        # And so has what is short, but can be worked with.
        if name == "JOURNAL_RETENTION" and value == 1.5:
            continue
        assert [f"METERLY['{name}']" in error.msg for error in errors] == [True], shown
        assert len(errors[0].msg) < 1500, shown
        with pytest.raises(ImproperlyConfigured) as caught:
            getattr(meterly_settings, name)
        assert str(caught.value) == errors[0].msg


@pytest.mark.parametrize("name", ["TRANSPORT", "SIGNER", "EXTERNAL_ID"])
def test_functions_and_classes_are_given_as_they_are_or_by_their_paths(
    settings: Any, name: str
) -> None:
    given: dict[str, Any] = {
        "TRANSPORT": HttpTransport,
        "SIGNER": BearerSigner,
        "EXTERNAL_ID": external_id,
    }
    value = given[name]
    for each in (value, f"{value.__module__}.{value.__qualname__}"):
        settings.METERLY = {"API_KEY": "mk_test_x", name: each}
        assert getattr(meterly_settings, name) is value
        assert found() == []
        assert isinstance(get_client().transport, HttpTransport)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("django_meterly.resolvers.externalid", "does not define"),
        ("django_meterly.resolver.external_id", "No module named"),
        ("django_meterly.resolvers", "must be a function or a class"),
        ("django_meterly.__version__", "must be a function or a class"),
        ("external_id", "doesn't look like a module path"),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_path_that_leads_to_no_function_is_refused(
    settings: Any, name: str, path: str, why: str
) -> None:
    settings.METERLY = {"API_KEY": "mk_test_x", name: path}
    with pytest.raises(ImproperlyConfigured, match=rf"^METERLY\['{name}'\] .*{why}"):
        getattr(meterly_settings, name)
    (error,) = found()
    assert error.id == "meterly.E004"


@pytest.mark.parametrize(
    ("value", "takes"),
    [
        (lambda: None, "takes ()"),
        ("os.getcwd", "getcwd takes ()"),
        (lambda request, tenant: None, "takes (request, tenant)"),
        (lambda *, request: None, "takes (*, request)"),
        (lambda **values: None, "takes (**values)"),
        (object, "object takes ()"),
        (lambda *given: None, None),
        (lambda request, tenant=None: None, None),
        (dict, None),
        ("builtins.len", None),
    ],
)
@pytest.mark.parametrize(
    ("name", "given"), [("CUSTOMER_RESOLVER", "request"), ("EXTERNAL_ID", "owner")]
)
def test_a_function_that_cannot_be_called_is_found_by_check(
    settings: Any, name: str, given: str, value: Any, takes: str | None
) -> None:
    settings.METERLY = {**settings.METERLY, name: value}
    errors = [each for each in found() if each.is_serious()]
    if takes is None:
        assert errors == []
    else:
        (error,) = errors
        assert error.id == "meterly.E004"
        assert error.msg.startswith(f"METERLY['{name}'] is called with ({given}), but")
        assert takes in error.msg


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("auth.Usr", "'auth.User'"),
        ("Auth.User", "'auth.User'"),
        ("auth.user.x", "'auth.User'"),
        ("User", "'auth.User'"),
        ("studio.User", "'auth.User'"),
        ("nothing.Alike", ""),
        ("auth", "'auth.User'"),
        (User, "'auth.User'"),
    ],
)
def test_a_customer_model_that_is_not_there_gets_a_suggestion(
    settings: Any, value: Any, meant: str
) -> None:
    settings.METERLY = {**settings.METERLY, "CUSTOMER_MODEL": value}
    (error,) = found()
    assert error.id == "meterly.E003"
    assert error.msg.startswith("METERLY['CUSTOMER_MODEL'] ")
    assert error.msg.endswith(f"Did you mean {meant}?" if meant else ".")


def test_another_wrong_setting_leaves_the_owners_model_alone(settings: Any) -> None:
    settings.METERLY = {"CUSTOMER_MODEL": "auth.Group", "NO_SUCH": 1, "DEADLINE": ""}
    assert meterly_settings.owner_model() == "auth.Group"


@pytest.mark.parametrize("value", ["auth.User", "auth.user", None])
def test_a_customer_model_is_named_as_django_names_models(
    settings: Any, value: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "CUSTOMER_MODEL": value}
    assert found() == []


# The environment


def test_f65_environment_fills_the_settings() -> None:
    options = {"poster": {"unit": "image_credits", "amount": 25}, "api:": {}}
    assert from_env(
        environment(
            METERLY_API_KEY="mk_test_x",
            METERLY_DEADLINE="2.5",
            METERLY_READ_TIMEOUT=" 3\n",
            METERLY_LEASE_GRACE="1e2",
            METERLY_MAX_SETTLE_ATTEMPTS="3",
            METERLY_ALLOW_INSECURE_HTTP="on",
            METERLY_LOW_BALANCE='{"tokens": 50, "images": 5}',
            METERLY_GUARDED_VIEWS=json.dumps(options),
            METERLY_SIGNER="shop.signing.Signer",
            METERLY_TOP_UP_URL="https://shop.test/gutscheine?für=größe",
            METERLY_ENFORCEMENT="shadow",
            OTHER="x",
        )
    ) == {
        "API_KEY": "mk_test_x",
        "DEADLINE": 2.5,
        "READ_TIMEOUT": 3,
        "LEASE_GRACE": 100,
        "MAX_SETTLE_ATTEMPTS": 3,
        "ALLOW_INSECURE_HTTP": True,
        "LOW_BALANCE": {"tokens": 50, "images": 5},
        "GUARDED_VIEWS": options,
        "SIGNER": "shop.signing.Signer",
        "TOP_UP_URL": "https://shop.test/gutscheine?für=größe",
        "ENFORCEMENT": "shadow",
    }


@pytest.mark.parametrize(
    ("name", "value", "must_be"),
    [
        *(
            ("DEADLINE", value, "a number")
            for value in (
                *("soon", "5m", "5 s", "0x10", "nan", "NaN", "inf", "Infinity", "1,5"),
                *("1_000", "08", "true", "null", "[1]", '"5"', "--1", "٣", "1e", "."),
            )
        ),
        *(
            ("MAX_ATTEMPTS", value, "a whole number")
            for value in ("three", "3.0", "3.5", "true", "null", "0x3", "[3]")
        ),
        *(
            ("LOW_BALANCE", value, "a JSON object")
            for value in (
                *("tokens=50;images=5", "tokens", "tokens=few", "[]", "null", "5"),
                *("{'tokens': 5}", '{"tokens": 5', '{"tokens": NaN}', "[" * 100_000),
            )
        ),
        *(
            ("ALLOW_INSECURE_HTTP", value, "true or false")
            for value in ("maybe", "2", "-1", "none", "oui", "null", "0.0")
        ),
    ],
)
def test_f65_value_of_another_type_is_refused_by_name(
    name: str, value: str, must_be: str
) -> None:
    message = f"^The environment variable METERLY_{name} must be {must_be}"
    with pytest.raises(ImproperlyConfigured, match=message) as caught:
        from_env(environment(**{f"METERLY_{name}": value}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE", "yes", "on", "1", " on\n")),
        *((word, False) for word in ("false", "False", "no", "off", "0", "OFF")),
    ],
)
def test_f65_truth_is_read_in_every_spelling(word: str, value: bool) -> None:
    read = from_env(environment(METERLY_ALLOW_INSECURE_HTTP=word))
    assert read == {"ALLOW_INSECURE_HTTP": value}


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("name", list(DEFAULTS))
def test_f65_empty_variable_is_no_value_or_refused(name: str, empty: str) -> None:
    env = environment(**{f"METERLY_{name}": empty})
    if not DEFAULTS[name]:
        assert from_env(env) == {}
    else:
        with pytest.raises(ImproperlyConfigured, match=f"METERLY_{name} is empty"):
            from_env(env)


#: What Kubernetes and Docker put into every process beside a service "meterly".
PLATFORMS = {
    "METERLY_SERVICE_HOST": "10.0.0.11",
    "METERLY_SERVICE_PORT": "80",
    "METERLY_SERVICE_PORT_HTTP": "80",
    "METERLY_SERVICE_PORT_HTTP_METRICS": "81",
    "METERLY_PORT": "tcp://10.0.0.11:80",
    "METERLY_PORT_80_TCP": "tcp://10.0.0.11:80",
    "METERLY_PORT_80_TCP_PROTO": "tcp",
    "METERLY_PORT_80_TCP_PORT": "80",
    "METERLY_PORT_80_TCP_ADDR": "10.0.0.11",
    "METERLY_PORT_53_UDP_PORT_START": "53",
    "METERLY_PORT_9_SCTP_PORT_END": "9",
    "METERLY_NAME": "/web/meterly",
    "METERLY_ENV_LANG": "C.UTF-8",
    "METERLY_ENV_API_KEY": "x",
    "METERLY_1_PORT": "tcp://172.17.0.2:80",
    "METERLY_1_PORT_80_TCP_ADDR": "172.17.0.2",
    "METERLY_1_NAME": "/web/meterly_1",
    "METERLY_WEB_SERVICE_HOST": "10.0.0.12",
    "METERLY_LEDGER_PORT_8000_TCP": "tcp://10.0.0.13:8000",
    "METERLY_DB_1_ENV_POSTGRES_USER": "x",
    # Services whose names are nearly those of settings.
    "METERLY_RESERVATION_TTL_PORT": "tcp://10.0.0.14:80",
    "METERLY_RESERVATION_TTL_NAME": "/web/meterly-reservation-ttl",
    "METERLY_MAX_SETTLE_ATTEMPTS_PORT": "tcp://10.0.0.15:80",
    "METERLY_LOW_BALANCE_COOLDOWN_NAME": "/web/meterly-low-balance-cooldown",
    "METERLY_CUSTOMER_RESOLVER_PORT": "tcp://10.0.0.16:80",
    "METERLY_TRANSPORT_PORT": "tcp://10.0.0.17:80",
}


def test_f65_variables_that_platforms_make_are_ignored(
    ignored: dict[str, str],
) -> None:
    env = environment(METERLY_API_KEY="x", **PLATFORMS)
    assert from_env(env) == {"API_KEY": "x"}
    assert ignored == {}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("BASE_ULR", "BASE_URL"), ("API_KEYY", "API_KEY"), ("APIKEY", "API_KEY")),
        *(("api_key", "API_KEY"), ("TOPUP_URL", "TOP_UP_URL"), ("DEADLIN", "DEADLINE")),
        *(("TRANSPRT", "TRANSPORT"), ("GUARDED_VIEW", "GUARDED_VIEWS")),
        ("TRANS_PORT", "TRANSPORT"),
        *(("LOW_BALANCES", "LOW_BALANCE"), ("OVERAGES", "OVERAGE")),
        ("CUSTOMER_RESOLVER_", "CUSTOMER_RESOLVER"),
        ("ALLOW_INSECURE_HTPP", "ALLOW_INSECURE_HTTP"),
    ],
)
def test_f65_typo_is_refused_with_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"Did you mean '{meant}'"):
        from_env(environment(**{f"METERLY_{name}": "x"}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TEST_NO_SKIP", ""),
        ("LEDGER_WORKSPACE", ""),
        ("LOG_LEVEL", ""),
        ("DATABASE_URL", "BASE_URL"),
        ("TIMEOUT", "READ_TIMEOUT"),
        ("KEY", "API_KEY"),
    ],
)
def test_f65_name_that_is_not_ours_is_ignored_and_warned_of(
    name: str, hint: str
) -> None:
    assert from_env(environment(**{f"OUR_{name}": "x"}), "OUR_") == {}
    (warning,) = found()
    assert warning.id == "meterly.W013"
    assert f"OUR_{name} names no setting" in warning.msg
    assert warning.msg.endswith(f"Did you mean '{hint}'?" if hint else "ignores it.")


def test_f65_scheme_and_prefix_of_the_env_are_kept() -> None:
    scheme = {"METERLY_DEADLINE": (float, 2.5), "METERLY_API_KEY": (str, "mk_test_x")}
    scheme |= {"METERLY_SIGNER": (str, None), "METERLY_READ_TIMEOUT": (int, 4)}
    env = Environ(**scheme, METERLY_OVERAGE=str, DEBUG=(bool, False))
    env.ENVIRON = {"METERLY_DEADLINE": "1e1"}
    assert from_env(env) == {
        "DEADLINE": 10,
        "API_KEY": "mk_test_x",
        "READ_TIMEOUT": 4,
    }
    env = environment(SHOP_METERLY_API_KEY="a", METERLY_API_KEY="b", SHOP_B_API_KEY="c")
    env.prefix = "SHOP_"
    assert from_env(env) == {"API_KEY": "a"}
    assert from_env(env, "B_") == {"API_KEY": "c"}
    env.prefix = ""
    assert from_env(env, "SHOP_METERLY_") == {"API_KEY": "a"}
    assert from_env(environment(API_KEY="d", PATH="/bin"), "") == {"API_KEY": "d"}


def test_f65_smart_casts_and_defaults_change_nothing() -> None:
    env = environment(METERLY_DEADLINE="3", METERLY_DEFAULT_UNIT="7")
    env.smart_cast, env.warn_on_default = False, True
    assert from_env(env) == {"DEADLINE": 3, "DEFAULT_UNIT": "7"}


def test_f65_value_that_begins_with_a_dollar_is_another_variables() -> None:
    env = environment(METERLY_API_KEY="$LEDGER_KEY", LEDGER_KEY="mk_test_x")
    assert from_env(env) == {"API_KEY": "mk_test_x"}
    env = environment(METERLY_API_KEY="$mk_test_x")
    with pytest.raises(
        ImproperlyConfigured, match=r"METERLY_API_KEY begins with \$"
    ) as (caught):
        from_env(env)
    assert "mk_test_x" not in str(caught.value)
    env = environment(METERLY_API_KEY="$METERLY_API_KEY")
    with pytest.raises(ImproperlyConfigured, match=r"METERLY_API_KEY begins with \$"):
        from_env(env)
    env = environment(METERLY_API_KEY=r"\$mk_test_x")
    env.escape_proxy = True
    assert from_env(env) == {"API_KEY": "$mk_test_x"}


def test_f65_values_of_a_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "METERLY_API_KEY='mk_test_x'\n"
        'METERLY_DEFAULT_UNIT="image_credits"\n'
        "export METERLY_DEADLINE=5\n"
        "METERLY_TOP_UP_URL=\n"
        'METERLY_LOW_BALANCE={"image_credits": 10}\n'
    )
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(Environ, "ENVIRON", os.environ)
    Environ.read_env(file)
    assert from_env(Environ()) == {
        "API_KEY": "mk_test_x",
        "DEFAULT_UNIT": "image_credits",
        "DEADLINE": 5,
        "LOW_BALANCE": {"image_credits": 10},
    }


def test_f65_secret_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "api_key"
    file.write_text("mk_test_x\n")
    variables = {"METERLY_API_KEY_FILE": str(file), "METERLY_DEFAULT_UNIT": "tokens"}
    env = FileAwareEnv()
    env.ENVIRON = FileAwareMapping(variables)
    values = from_env(env)
    assert values == {"API_KEY": "mk_test_x", "DEFAULT_UNIT": "tokens"}
    assert "mk_test_x" not in repr(values)
    with pytest.raises(ImproperlyConfigured, match=r"METERLY_API_KEY_FILE .*FileAware"):
        from_env(environment(**variables))
    env.ENVIRON = FileAwareMapping({"METERLY_API_KEY_FILE": ""})
    assert from_env(env) == {}
    for content in (None, b"\xff\xfe"):
        file.unlink()
        if content:
            file.write_bytes(content)
        env.ENVIRON = FileAwareMapping(variables)
        with pytest.raises(
            ImproperlyConfigured, match="METERLY_API_KEY cannot be read"
        ):
            from_env(env)
        file.touch()


@pytest.mark.parametrize("env", [environ.Env, os.environ, {}, None, "METERLY_"])
def test_f65_something_else_than_an_env_is_refused(env: Any) -> None:
    with pytest.raises(
        TypeError, match=r"from_env takes a django-environ Env\(\), not"
    ):
        from_env(env)


def test_f46_no_variable_shows_the_key(settings: Any) -> None:
    env = environment(METERLY_API_KEY=" mk_test_secret ")
    values = from_env(env)
    assert isinstance(values["API_KEY"], Secret)
    settings.METERLY = values
    assert isinstance(meterly_settings.API_KEY, Secret)
    settings.METERLY = {"API_KEY": "mk_test_secret "}
    assert meterly_settings.API_KEY == "mk_test_secret"
    assert isinstance(meterly_settings.API_KEY, Secret)


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


def _fails() -> str:
    raise RuntimeError("no database")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (reverse_lazy("typo"), "NoReverseMatch: Reverse for 'typo' not found"),
        (reverse_lazy("no:such"), "NoReverseMatch: 'no' is not a registered name"),
        (lazy(_fails, str)(), "RuntimeError: no database"),
    ],
)
@pytest.mark.parametrize("name", ["TOP_UP_URL", "UNITS"])
def test_a_lazy_text_that_cannot_be_evaluated_is_an_error_that_names_the_setting(
    settings: Any, name: str, value: Any, why: str
) -> None:
    project = settings.METERLY
    given = {"image_credits": value} if name == "UNITS" else value
    settings.METERLY = {**project, name: given}
    (error,) = check_settings_errors()
    assert error.msg.startswith(f"METERLY['{name}']")
    assert f" cannot be evaluated: {why}" in error.msg
    if name == "TOP_UP_URL":
        with pytest.raises(ImproperlyConfigured, match=r"'TOP_UP_URL'\] cannot be"):
            _ = meterly_settings.TOP_UP_URL


@pytest.mark.urls("tests.test_units")
def test_a_top_up_url_may_be_named(settings: Any) -> None:
    settings.METERLY = {**settings.METERLY, "TOP_UP_URL": reverse_lazy("good")}
    assert meterly_settings.TOP_UP_URL == "/good/"
    settings.METERLY = {**settings.METERLY, "TOP_UP_URL": gettext_lazy("")}
    assert meterly_settings.TOP_UP_URL is None


def check_settings_errors() -> list[Any]:
    errors = [*check_settings()]
    return [error for error in errors if error.id == "meterly.E003"]
