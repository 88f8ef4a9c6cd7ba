"""Credit units: which ones there are, and what people call them.

``METERLY["UNITS"]`` declares both. The rule is for units that somebody types: in a
guard, a grant, a setting, a template. What is on record already is settled and shown,
also after its unit was taken out of ``UNITS``.
"""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured
from django.utils.formats import localize

from .conf import meterly_settings, suggestion
from .wire import check_unit, shown


def check_declared(value: object, name: str = "unit") -> str:
    """Return *value* if it is a credit unit that ``UNITS`` declares.

    Without ``UNITS``, every unit will do. Raises ``ValueError``, with a suggestion.
    """
    unit = check_unit(value, name)
    declared = meterly_settings.UNITS
    if declared and unit not in declared:
        raise ValueError(
            f"{name} must be one that METERLY['UNITS'] declares, not {shown(unit)}."
            + (suggestion(unit, declared) or f" They are {', '.join(declared)}.")
            + " Declare a new unit there first."
        )
    return unit


def default() -> str | None:
    """Return ``DEFAULT_UNIT``, if there is one.

    Raises ``ImproperlyConfigured`` if ``UNITS`` does not declare it.
    """
    unit = meterly_settings.DEFAULT_UNIT
    if unit is None:
        return None
    try:
        return check_declared(unit, "METERLY['DEFAULT_UNIT']")
    except ValueError as exc:
        raise ImproperlyConfigured(str(exc)) from exc


def name_of(unit: str) -> str:
    """Return what people call *unit*; *unit* itself if ``UNITS`` does not say."""
    return str(meterly_settings.UNITS.get(unit, unit))


def counted(amount: int, unit: str) -> str:
    """Return an amount for people, the number first: "25 image credits"."""
    return f"{localize(amount)} {name_of(unit)}"
