"""Models whose rows Python refuses to change or delete.

Entries, seals and key events are append-only: a balance can be rebuilt from the entries
at any time, and a customer's question about a charge can be answered years later, only
if nobody has edited them. A wrong entry is corrected by another entry. Python's refusal
tells a developer early; ``triggers`` makes the database refuse, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from django.db import models

from ..errors import MeterlyUsageError

if TYPE_CHECKING:
    from django.db.models.base import ModelState

#: The error text of the triggers and of Python.
APPEND_ONLY = "The ledger's entries, seals and key events are append-only."


class AppendOnlyQuerySet(models.QuerySet[Any]):
    def bulk_create(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Insert rows. Raises ``MeterlyUsageError`` for ``update_conflicts``."""
        if kwargs.get("update_conflicts"):
            raise MeterlyUsageError(APPEND_ONLY)
        return super().bulk_create(*args, **kwargs)

    def update(self, **kwargs: Any) -> NoReturn:
        """Refuse: the rows are append-only."""
        raise MeterlyUsageError(APPEND_ONLY)

    def delete(self) -> NoReturn:
        """Refuse: the rows are append-only."""
        raise MeterlyUsageError(APPEND_ONLY)

    def _raw_delete(self, using: str | None) -> NoReturn:
        raise MeterlyUsageError(APPEND_ONLY)

    # Django's own marks: templates must not call these, nor a related manager delete.
    update.alters_data = True  # type: ignore[attr-defined]
    delete.alters_data = True  # type: ignore[attr-defined]
    delete.queryset_only = True  # type: ignore[attr-defined]


class AppendOnly:
    """A mixin for models whose rows are never changed, and never deleted."""

    _state: ModelState

    def save(self, **kwargs: Any) -> None:
        """Insert the row.

        Raises ``MeterlyUsageError`` if it was loaded or saved before, and
        ``IntegrityError`` if the primary key is taken.
        """
        if not self._state.adding:
            raise MeterlyUsageError(APPEND_ONLY)
        kwargs["force_insert"] = True
        super().save(**kwargs)  # type: ignore[misc]

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the rows are append-only."""
        raise MeterlyUsageError(APPEND_ONLY)
