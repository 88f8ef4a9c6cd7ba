"""The only reader of ``settings.METERLY``.

Every access reads the Django settings anew, so ``override_settings`` works and
nothing goes stale. Names that do not exist fail, with a suggestion.
"""

from __future__ import annotations

import datetime as dt
import difflib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.functional import Promise

from .transports.base import check_unit
from .transports.signing import Secret

if TYPE_CHECKING:
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

#: Durations: a number of seconds or a ``timedelta``; read as seconds.
DURATIONS = {
    "CONNECT_TIMEOUT",
    "READ_TIMEOUT",
    "DEADLINE",
    "RESERVATION_TTL",
    "LOW_BALANCE_COOLDOWN",
    "LEASE_GRACE",
    "JOURNAL_RETENTION",
}


def check_choice(name: str, value: str) -> None:
    """Raise ``ValueError`` unless *value* is one of the words the setting takes."""
    choices = CHOICES[name.upper()]
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")


def suggestion(name: str, known: Any) -> str:
    """Return ``" Did you mean 'X'?"`` for a name that is close to a *known* one."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(name: str, known: Any) -> Any:
    """Return the *known* name that is close to this one, or ``None``."""
    spelled = {str(each).upper(): each for each in known}
    close = difflib.get_close_matches(name.upper(), list(spelled), n=1)
    return spelled[close[0]] if close else None


class MeterlySettings:
    """``settings.METERLY`` with its defaults, as attributes.

    Raises ``ImproperlyConfigured`` for a ``METERLY`` that is not a dict, for a
    name in it that does not exist, for an invalid duration or unit and for an unsafe
    link.
    """

    #: The dict whose names are known to exist: looking at each of them is for once.
    _checked: dict[str, Any] | None = None

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
        if self.as_dict() is not self._checked:
            self._check()
        value = self.as_dict().get(name, DEFAULTS[name])
        if name == "CUSTOMER_MODEL":
            return value or settings.AUTH_USER_MODEL
        if name == "TOP_UP_URL":
            return _link(name, value)
        if name == "UNITS":
            return _units(name, value)
        return _seconds(name, value) if name in DURATIONS else value

    def _check(self) -> None:
        for key in self.as_dict():
            if key not in DEFAULTS:
                raise ImproperlyConfigured(
                    f"There is no setting METERLY[{key!r}].{suggestion(key, DEFAULTS)}"
                )
        self._checked = self.as_dict()


def _seconds(name: str, value: Any) -> float | int:
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
        # A whole number of seconds stays one: the wire's ttlSeconds is an integer.
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ImproperlyConfigured(
            f"METERLY[{name!r}] must be a positive number of seconds or a timedelta, "
            f"not {value!r}."
        )
    return value


def _units(name: str, value: Any) -> dict[str, Any]:
    """Return *value* if it is a dict of units and their names for people.

    A translation is not looked at: that would need the app registry.
    """
    problem = "" if isinstance(value, dict) else f"not {value!r}"
    if not problem:
        for unit, people_say in value.items():
            try:
                check_unit(unit, "a unit")
            except ValueError as exc:
                problem = f"and {exc.args[0].rstrip('.')}"
            if not isinstance(people_say, Promise) and (
                not isinstance(people_say, str) or not people_say.strip()
            ):
                problem = f"and the name of {unit!r} must be a text, not {people_say!r}"
    if problem:
        raise ImproperlyConfigured(
            f"METERLY[{name!r}] must be a dict of units and their names, "
            f"{{'image_credits': 'image credits'}}, {problem}."
        )
    return value  # type: ignore[no-any-return]


def _link(name: str, value: Any) -> str | None:
    """Return *value* if browsers take it for an http(s) URL or a path of this site.

    Nobody else's text gets into a setting, but a setting gets into pages: browsers
    drop spaces and control characters, and read ``\\`` as ``/``.
    """
    if not value:
        return None
    link = str(value)
    if link.startswith("/"):
        safe = not link.startswith("//")
    else:
        try:
            parts = urlsplit(link)
            safe = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            safe = False
    if not safe or not link.isprintable() or set(link) & {" ", "\\"}:
        raise ImproperlyConfigured(
            f"METERLY[{name!r}] must be an http or https URL, or a path that begins "
            f"with one slash, not {link!r}."
        )
    return link


meterly_settings = MeterlySettings()


def from_env(env: environ.Env, prefix: str = "METERLY_") -> dict[str, Any]:
    """Return a ``METERLY`` dict filled from ``METERLY_*`` environment variables.

    *env* is a ``django-environ`` ``Env``. ``METERLY_API_KEY`` sets ``API_KEY``
    and so on; values are cast to the type of the default. Raises
    ``ImproperlyConfigured`` for a value that cannot be cast, and for a variable
    with the prefix that names no setting. The key is a ``Secret``, whose
    ``repr`` (in ``manage.py diffsettings``, say) does not show it.
    """
    values: dict[str, Any] = {}
    for variable in env.ENVIRON:
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix)
        if name not in DEFAULTS:
            raise ImproperlyConfigured(
                f"The environment variable {variable} names no setting of METERLY."
                f"{suggestion(name, DEFAULTS)}"
            )
        default = DEFAULTS[name]
        cast: Any = str if default is None else type(default)
        cast = Secret if name == "API_KEY" else cast
        # unit=number;unit=number
        cast = {"value": int} if cast is dict else cast
        try:
            values[name] = env.get_value(variable, cast=cast)
        except (IndexError, ValueError) as exc:
            raise ImproperlyConfigured(
                f"The environment variable {variable} must be a "
                f"{type(default).__name__}, not {env.ENVIRON[variable]!r}."
            ) from exc
    return values
