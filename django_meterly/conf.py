"""The only reader of ``settings.METERLY``.

Every access reads the Django settings anew, so ``override_settings`` works and
nothing goes stale. Names that do not exist fail, with a suggestion.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.functional import Promise
from django.utils.module_loading import import_string

from .transports.base import Transport
from .transports.signing import Secret
from .wire import (
    check_amount,
    check_api_key,
    check_base_url,
    check_ttl,
    check_unit,
    clean_text,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import environ

DEFAULTS: dict[str, Any] = {
    "TRANSPORT": "django_meterly.transports.HttpTransport",
    "API_KEY": None,
    "SIGNER": None,
    "BASE_URL": "https://api.getmeterly.dev",
    "ALLOW_INSECURE_HTTP": False,
    "CONNECT_TIMEOUT": 2.0,
    "READ_TIMEOUT": 3.0,
    "DEADLINE": 8.0,
    "MAX_ATTEMPTS": 3,
    "DEFAULT_UNIT": None,
    "UNITS": {},
    "RESERVATION_TTL": 300,
    "CUSTOMER_MODEL": None,
    "CUSTOMER_RESOLVER": "django_meterly.resolvers.request_user",
    "EXTERNAL_ID": "django_meterly.resolvers.external_id",
    "OVERAGE": "charge",
    "ON_DISCONNECT": "charge",
    "ON_DEBT": "deny",
    "GUARDED_VIEWS": {},
    "ENFORCEMENT": "enforce",
    "ON_UNAVAILABLE": "deny",
    "UNAVAILABLE_CAP": 0,
    "LOW_BALANCE": {},
    "LOW_BALANCE_COOLDOWN": 86400.0,
    "TOP_UP_URL": None,
    "LEASE_GRACE": 60.0,
    "MAX_SETTLE_ATTEMPTS": 20,
    "JOURNAL_RETENTION": 90 * 86400.0,
}

#: Policies: one of these words.
CHOICES = {
    "OVERAGE": ("charge", "cap"),
    "ON_DISCONNECT": ("charge", "release"),
    "ON_DEBT": ("deny", "allow"),
    "ENFORCEMENT": ("enforce", "shadow", "off"),
    "ON_UNAVAILABLE": ("deny", "allow"),
}

#: Durations in seconds, a number or a ``timedelta``, and the longest that is allowed:
#: a day for what a call waits for, else a hundred years, which every clock can add.
DURATIONS = {
    "CONNECT_TIMEOUT": 86400,
    "READ_TIMEOUT": 86400,
    "DEADLINE": 86400,
    "LOW_BALANCE_COOLDOWN": 36500 * 86400,
    "LEASE_GRACE": 36500 * 86400,
    "JOURNAL_RETENTION": 36500 * 86400,
}

#: Functions and classes, or their dotted paths.
FUNCTIONS = ("TRANSPORT", "SIGNER", "CUSTOMER_RESOLVER", "EXTERNAL_ID")

#: Variables that Kubernetes and Docker make for a service whose name begins with
#: "meterly": ``METERLY_SERVICE_HOST``, ``METERLY_PORT_80_TCP_ADDR``, ``METERLY_NAME``.
PLATFORM = re.compile(
    # METERLY_TRANS_PORT is a misspelled TRANSPORT.
    r"(?!TRANS_PORT$)(?:.+_)?(?:SERVICE_(?:HOST|PORT(?:_.+)?)|NAME|ENV_.+|"
    r"PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|ADDR|PORT)(?:_.+)?)?)?)"
)
#: How alike a variable's name and a setting's have to be to be called a typo.
TYPO = 0.85
#: The variables that ``from_env`` has ignored, and their names without the prefix: a
#: check lists them.
ignored_variables: dict[str, str] = {}


def check_choice(name: str, value: object, label: str = "") -> str:
    """Return *value* if it is one of the words of the setting *name*.

    Raises ``ValueError``, whose message begins with *label*, or else with *name*.
    """
    choices = CHOICES[name.upper()]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{label or name} must be one of {', '.join(choices)}, not {shown(value)}."
        )
    return value


def suggestion(name: object, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """Return ``" Did you mean 'X'?"`` for a name that is close to a *known* one."""
    near = nearest(name, known, cutoff)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(name: object, known: Iterable[Any], cutoff: float = 0.6) -> Any:
    """Return the *known* name that is close to this one, or ``None``."""
    spelled = {str(each).upper(): each for each in known}
    text = name.upper() if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, list(spelled), n=1, cutoff=cutoff)
    return spelled[close[0]] if close else None


class MeterlySettings:
    """``settings.METERLY`` with its defaults, as attributes.

    Raises ``ImproperlyConfigured`` for a ``METERLY`` that is not a dict, for a name in
    it that does not exist, and for an invalid value. For example, a ``DEADLINE`` of
    ``"8"`` is invalid, because it is not a number.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return the project's own dict, unchanged."""
        value = getattr(settings, "METERLY", {})
        if not isinstance(value, dict):
            raise ImproperlyConfigured(
                f"METERLY must be a dict, not {type(value).__name__}."
            )
        return value

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(f"There is no setting METERLY[{name!r}].")
        # The dict is in no local variable: debug pages would show the key with it.
        for key in self.unknown():
            raise ImproperlyConfigured(
                f"There is no setting METERLY[{shown(key)}].{suggestion(key, DEFAULTS)}"
            )
        problem = ""
        try:
            return CHECKS[name](
                self.as_dict().get(name, DEFAULTS[name]), f"METERLY[{name!r}]"
            )
        except ValueError as exc:
            problem = str(exc)
        # Out here: the error's context would keep the value in a frame.
        raise ImproperlyConfigured(problem)

    def check(self) -> None:
        """Raise ``ImproperlyConfigured`` if any setting is invalid."""
        for name in DEFAULTS:
            getattr(self, name)

    def unknown(self) -> list[Any]:
        """Return the names in the project's dict that do not exist."""
        return [name for name in self.as_dict() if name not in DEFAULTS]

    def owner_model(self) -> str:
        """Return the model that ``Customer.owner`` points to.

        This is ``CUSTOMER_MODEL``. If that is invalid, it is the user model: models are
        imported before the system checks run, and the checks explain it better than an
        exception here. Nothing works until it is valid, and ``migrate`` refuses to run.
        """
        project = getattr(settings, "METERLY", {})
        value = project.get("CUSTOMER_MODEL") if isinstance(project, dict) else None
        try:
            model = _model(value, "CUSTOMER_MODEL")
        except ValueError:
            return str(settings.AUTH_USER_MODEL)
        # The apps are known when models are imported, their models are not yet.
        label, _, _ = model.partition(".")
        known = {config.label for config in apps.app_configs.values()}
        return model if label in known else str(settings.AUTH_USER_MODEL)


def _choice(setting: str, value: Any, name: str) -> str:
    return check_choice(setting, value, name)


def _seconds(value: Any, name: str, *, most: int) -> float | int:
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
        # A whole number of seconds stays one: the wire's ttlSeconds is an integer.
        value = int(value) if value.is_integer() else value
    # This refuses NaN, too.
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ValueError(
            f"{name} must be a positive number of seconds or a timedelta, at most "
            f"{dt.timedelta(seconds=most).days} days, not {shown(value)}."
        )
    return cast("float | int", value)


def _ttl(value: Any, name: str) -> int:
    if isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
        value = int(seconds) if seconds.is_integer() else seconds
    return check_ttl(value, name)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(
            f"{name} must be a whole number from 1 to 2**31 - 1, not {shown(value)}."
        )
    return value


def _credits(value: Any, name: str) -> int:
    return check_amount(value, name, minimum=0)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {shown(value)}.")
    return value


def _dict(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict, not {shown(value)}.")
    return value


def _thresholds(value: Any, name: str) -> dict[str, int]:
    for unit, threshold in _dict(value, name).items():
        check_unit(unit, f"{name}: the unit {shown(unit)}")
        check_amount(threshold, f"{name}[{unit!r}]")
    return cast("dict[str, int]", value)


def _units(value: Any, name: str) -> dict[str, Any]:
    """Return *value* if it is a dict of units and their names for people.

    A translation is not looked at: that would need the app registry.
    """
    for unit, people_say in _dict(value, name).items():
        check_unit(unit, f"{name}: the unit {shown(unit)}")
        if not isinstance(people_say, Promise) and (
            not isinstance(people_say, str) or not people_say.strip()
        ):
            raise ValueError(
                f"{name}[{unit!r}] must be a name for people, like 'image credits', "
                f"not {shown(people_say)}."
            )
    return cast("dict[str, Any]", value)


def text_of(value: str | Promise, name: str) -> str:
    """Return a text that may be lazy; ``ValueError`` if it cannot be evaluated.

    For example, ``reverse_lazy("typo")`` fails only here, and in its own way.
    """
    try:
        return str(value)
    except Exception as exc:
        why = clean_text(str(exc), 300)
        raise ValueError(
            f"{name} cannot be evaluated: {type(exc).__name__}: {why}"
        ) from exc


def _unit(value: Any, name: str) -> str | None:
    return None if value is None else check_unit(value, name)


def _api_key(value: Any, name: str) -> Secret | None:
    # An empty one is none: what an unset variable of a shell or container leaves.
    return None if value in (None, "") else Secret(check_api_key(value, name))


def _base_url(value: Any, name: str) -> str:
    # If it is neither True nor False, that is an error of its own.
    insecure = meterly_settings.as_dict().get("ALLOW_INSECURE_HTTP") is True
    return check_base_url(value, name, allow_insecure_http=insecure)


def _function(value: Any, name: str) -> Any:
    """Return the function or class that *value* is, or is the dotted path of."""
    path = value
    if isinstance(path, str):
        try:
            value = import_string(path)
        except (ImportError, TypeError, ValueError) as exc:
            why = clean_text(str(exc), 300)
            raise ValueError(f"{name} cannot be imported: {why}") from exc
    if not callable(value):
        raise ValueError(
            f"{name} must be a function or a class, or its dotted path, not "
            f"{shown(path)}."
        )
    return value


def _transport(value: Any, name: str) -> type[Transport]:
    transport = _function(value, name)
    if not isinstance(transport, type) or not issubclass(transport, Transport):
        raise ValueError(
            f"{name} must be a subclass of django_meterly.transports.Transport, or its "
            f"dotted path, not {shown(value)}."
        )
    return transport


def _signer(value: Any, name: str) -> Any:
    return None if value is None else _function(value, name)


def _model(value: Any, name: str) -> str:
    """Return ``"app_label.ModelName"``, of a model that exists if models are loaded."""
    if value is None:
        return str(settings.AUTH_USER_MODEL)
    if not isinstance(value, str) or not re.fullmatch(r"\w+\.\w+", value):
        raise ValueError(
            f"{name} must be 'app_label.ModelName', like 'studio.Team', not "
            f"{shown(value)}.{_model_suggestion(value)}"
        )
    if apps.models_ready:
        try:
            apps.get_model(value)
        except LookupError:
            raise ValueError(
                f"{name} is {value!r}, but no installed app has this model."
                f"{_model_suggestion(value)}"
            ) from None
    return value


def _model_suggestion(value: object) -> str:
    if not apps.models_ready:
        return ""
    # Not above: settings modules import this one.
    from django.db.models import Model

    # A model itself is spelled as it has to be named.
    if isinstance(value, type) and issubclass(value, Model):
        value = value._meta.label
    return suggestion(value, [model._meta.label for model in apps.get_models()])


def _link(value: Any, name: str) -> str | None:
    """Return *value* if browsers take it for an http(s) URL or a path of this site.

    Nobody else's text gets into a setting, but a setting gets into pages: browsers
    drop spaces and control characters, and read ``\\`` as ``/``.
    """
    # A number, say, is no link, and may be too long for str().
    text = text_of(value, name) if isinstance(value, str | Promise) else None
    # Nothing, or a text that is empty: what an unset variable leaves.
    if value is None or text == "":
        return None
    link = text or ""
    if link.startswith("/"):
        safe = not link.startswith("//")
    else:
        try:
            parts = urlsplit(link)
            safe = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            safe = False
    if not safe or not link.isprintable() or set(link) & {" ", "\\"}:
        raise ValueError(
            f"{name} must be an http or https URL, or a path that begins with one "
            f"slash, not {shown(link or value)}."
        )
    return link


#: What each value has to be: a function of the value and of its name for messages
#: that returns the value as it is used, or raises ``ValueError``.
CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "TRANSPORT": _transport,
    "API_KEY": _api_key,
    "SIGNER": _signer,
    "BASE_URL": _base_url,
    "ALLOW_INSECURE_HTTP": _flag,
    **{name: partial(_seconds, most=most) for name, most in DURATIONS.items()},
    "MAX_ATTEMPTS": _count,
    "DEFAULT_UNIT": _unit,
    "UNITS": _units,
    "RESERVATION_TTL": _ttl,
    "CUSTOMER_MODEL": _model,
    "CUSTOMER_RESOLVER": _function,
    "EXTERNAL_ID": _function,
    **{name: partial(_choice, name) for name in CHOICES},
    "GUARDED_VIEWS": _dict,
    "UNAVAILABLE_CAP": _credits,
    "LOW_BALANCE": _thresholds,
    "TOP_UP_URL": _link,
    "MAX_SETTLE_ATTEMPTS": _count,
}

meterly_settings = MeterlySettings()


def from_env(env: environ.Env, prefix: str = "METERLY_") -> dict[str, Any]:
    """Return a ``METERLY`` dict filled from ``METERLY_*`` environment variables.

    *env* is a ``django-environ`` ``Env``. ``METERLY_API_KEY`` sets ``API_KEY`` and so
    on. Numbers and dicts are JSON: ``METERLY_LOW_BALANCE='{"image_credits": 10}'``. A
    space or line feed at either end is dropped. An empty variable is ignored if the
    default is empty, too.

    Raises ``ImproperlyConfigured`` for a value of the wrong type, and for a variable
    whose name looks like a misspelled setting. Other variables with the prefix are
    ignored: Kubernetes makes ``METERLY_SERVICE_HOST`` for a service called "meterly". A
    check warns about those that no platform makes. Raises ``TypeError`` if *env* is not
    an ``Env``.

    The key is a ``Secret``, whose ``repr`` (in ``manage.py diffsettings``, for example)
    does not show it.
    """
    from environ import Env, FileAwareEnv

    if not isinstance(env, Env):
        what = "the class" if env is Env else f"a {type(env).__name__}"
        raise TypeError(f"from_env takes a django-environ Env(), not {what}.")
    start = f"{env.prefix}{prefix}"
    # What Env(METERLY_DEADLINE=(float, 5)) declares is a default, too.
    declared = [
        name
        for name, info in env.scheme.items()
        if isinstance(info, tuple) and len(info) == 2
    ]
    values: dict[str, Any] = {}
    for variable in sorted({*env.ENVIRON, *declared}):
        if not variable.startswith(start):
            continue
        name = variable.removeprefix(start)
        if name in DEFAULTS:
            if (value := _read(env, variable, name)) is not _EMPTY:
                values[name] = value
        elif name.removesuffix("_FILE") in DEFAULTS:
            if not isinstance(env, FileAwareEnv):
                raise ImproperlyConfigured(
                    f"The environment variable {variable} names a file, which only "
                    "environ.FileAwareEnv() reads. Use it in place of environ.Env()."
                )
        elif PLATFORM.fullmatch(name):
            # Of a service "meterly-reservation-ttl", for example: this is no typo.
            continue
        elif meant := suggestion(name, DEFAULTS, TYPO):
            raise ImproperlyConfigured(
                f"The environment variable {variable} names no setting of "
                f"METERLY.{meant}"
            )
        else:
            ignored_variables[variable] = name
    return values


#: An environment variable without a value.
_EMPTY = object()


def _read(env: environ.Env, variable: str, name: str) -> Any:
    """Return the value of *variable* in the type of the setting *name*."""
    default, problem = DEFAULTS[name], ""
    try:
        # Env adds its own prefix again.
        value = env.get_value(variable.removeprefix(env.prefix), cast=Secret)
    except (OSError, ValueError) as exc:
        problem = f"cannot be read from its file: {type(exc).__name__}"
    except (ImproperlyConfigured, RecursionError):
        if variable not in env.ENVIRON:
            return _EMPTY  # Only METERLY_..._FILE is there, and it is empty.
        problem = (
            "begins with $, and so django-environ takes it for the name of another "
            "variable, which is not set. With Env.escape_proxy = True, \\$ is a $"
        )
    else:
        if not isinstance(value, str):
            # A default of the scheme.
            return _EMPTY if value is None else value
        value = Secret(value.strip())
        if not value and not default:
            return _EMPTY
        if value:
            try:
                return _parse(value, default, name)
            except ValueError as exc:
                problem = str(exc)
        else:
            problem = "is empty. Give it a value, or unset it"
    # Out here: the error's context would keep the value in a frame.
    raise ImproperlyConfigured(f"The environment variable {variable} {problem}.")


def _parse(text: Secret, default: Any, name: str) -> Any:
    if name == "API_KEY":
        return text
    if default is None or isinstance(default, str):
        return str(text)
    if isinstance(default, bool):
        word = text.lower()
        if word in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return word in ("true", "yes", "on", "1")
        raise ValueError(f"must be true or false, not {shown(str(text))}")
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    try:
        value = _json(text)
    except (ValueError, RecursionError):
        value = None
    if type(value) not in kinds:
        kind, like = {
            int: ("a whole number", "3"),
            float: ("a number", "2.5"),
            dict: ("a JSON object", '{"name": 1}'),
        }[type(default)]
        raise ValueError(f"must be {kind}, like {like}, not {shown(str(text))}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


# Python's own decoder takes NaN and Infinity for numbers.
_json = json.JSONDecoder(parse_constant=_refuse_constant).decode
