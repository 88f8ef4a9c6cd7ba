"""Is each setting valid, and do the settings fit together?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage, Error, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured

from .. import functions, units
from ..conf import (
    DEFAULTS,
    FUNCTIONS,
    ignored_variables,
    meterly_settings,
    suggestion,
    text_of,
)
from ..wire import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..transports import Transport

#: The longest hold: its work has to find its row when it ends.
SHORTEST_RETENTION = 86400
#: Ids of errors in values; all others are E003.
_VALUE_IDS = {
    **dict.fromkeys(FUNCTIONS, "meterly.E004"),
    "API_KEY": "meterly.E006",
    "BASE_URL": "meterly.E007",
    "GUARDED_VIEWS": "meterly.E009",
}
#: What the functions that settings name are called with.
_ARGUMENTS = {"CUSTOMER_RESOLVER": "request", "EXTERNAL_ID": "owner"}


@register("meterly")
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check ``settings.METERLY``."""
    try:
        unknown = meterly_settings.unknown()
    except ImproperlyConfigured as exc:
        return [Error(str(exc), id="meterly.E001")]
    if unknown:
        # Every other setting refuses to be read until these are gone.
        return [
            Error(
                f"Unknown setting METERLY[{shown(name)}].",
                hint=suggestion(name, DEFAULTS).strip()
                or f"The settings are {', '.join(sorted(DEFAULTS))}.",
                id="meterly.E002",
            )
            for name in unknown
        ]
    return [*_check_values()] or [*_check_together(), *_check_transport()]


def _check_values() -> Iterator[CheckMessage]:
    """Check each setting by itself."""
    for name in DEFAULTS:
        try:
            value = getattr(meterly_settings, name)
        except ImproperlyConfigured as exc:
            yield Error(str(exc), id=_VALUE_IDS.get(name, "meterly.E003"))
            continue
        given = _ARGUMENTS.get(name)
        if given is not None and not functions.takes(value, [given]):
            refused = functions.cannot_take(f"METERLY[{name!r}]", value, given)
            yield Error(str(refused), id=_VALUE_IDS[name])


def _check_unit_names() -> Iterator[CheckMessage]:
    for unit, people_say in meterly_settings.UNITS.items():
        try:
            if not text_of(people_say, f"METERLY['UNITS'][{unit!r}]").strip():
                raise ValueError(f"METERLY['UNITS'] gives {unit!r} an empty name.")
        except ValueError as exc:
            yield Error(str(exc), id="meterly.E003")
    typed = [(unit, "METERLY['LOW_BALANCE']") for unit in meterly_settings.LOW_BALANCE]
    if meterly_settings.DEFAULT_UNIT is not None:
        typed.append((meterly_settings.DEFAULT_UNIT, "METERLY['DEFAULT_UNIT']"))
    for unit, name in typed:
        try:
            units.check_declared(unit, f"{name}: the unit")
        except ValueError as exc:
            yield Error(str(exc), id="meterly.E003")


def _check_together() -> Iterator[CheckMessage]:
    """Check settings that are valid alone, and may not fit each other."""
    yield from _check_unit_names()
    if meterly_settings.JOURNAL_RETENTION < SHORTEST_RETENTION:
        yield Error(
            "METERLY['JOURNAL_RETENTION'] must be at least one day, not "
            f"{meterly_settings.JOURNAL_RETENTION} seconds.",
            hint="Work may end late, and its reservation must still be there then.",
            id="meterly.E003",
        )
    if (
        meterly_settings.ON_UNAVAILABLE == "allow"
        and meterly_settings.UNAVAILABLE_CAP == 0
    ):
        yield CheckWarning(
            "METERLY['ON_UNAVAILABLE'] is 'allow', but UNAVAILABLE_CAP is 0: nothing "
            "is allowed.",
            hint="Set UNAVAILABLE_CAP to the credits a customer may have on trust.",
            id="meterly.W004",
        )
    for variable, name in sorted(ignored_variables.items()):
        yield CheckWarning(
            f"The environment variable {variable} names no setting of METERLY, and "
            f"from_env ignores it.{suggestion(name, DEFAULTS)}",
            hint="Rename it, or give from_env another prefix, if it is not a setting.",
            id="meterly.W013",
        )


def _check_transport() -> list[CheckMessage]:
    """Let the transport check the settings, unless no ledger is asked."""
    if meterly_settings.ENFORCEMENT == "off":
        return []
    transport: type[Transport] = meterly_settings.TRANSPORT
    return transport.check(meterly_settings)


@register("meterly", deploy=True)
def check_enforcement(**kwargs: Any) -> list[CheckMessage]:
    """Warn in production when guarded work runs without credits."""
    try:
        enforcement = meterly_settings.ENFORCEMENT
    except ImproperlyConfigured:
        return []  # check_settings reports it.
    if enforcement == "enforce":
        return []
    return [
        CheckWarning(
            f"METERLY['ENFORCEMENT'] is {enforcement!r}: work runs without credits.",
            hint="Set it to 'enforce' where work must be paid for.",
            id="meterly.W005",
        )
    ]
