"""``guard_view``: what ``meterly_guard`` and ``MeterlyMiddleware`` call for each view.

It chooses by the view's type: ``functions`` or ``classes``. ``MeterlyGuardMixin`` calls
``classes`` itself.
"""

from __future__ import annotations

from inspect import isclass
from typing import TYPE_CHECKING, Any

from .admission import Admission
from .classes import any_costs, guard_class
from .functions import guard_function
from .introspection import class_of, is_ninja_operation, is_rest

if TYPE_CHECKING:
    from .admission import OptionsFor, View


def guard_view(view: View, options_for: OptionsFor) -> View:
    """Return *view*, guarded by the options that *options_for* returns for a request.

    ``None`` says that the request is not guarded. *view* is a view function, the result
    of ``as_view()``, or a handler method. A view of Django REST framework is guarded
    where it calls its handler: by then its authentication has found the user. Raises
    ``TypeError`` for anything else.
    """
    _refuse_unless_view(view)
    admission = Admission(view, options_for)
    if is_rest(class_of(view)):
        return guard_class(view, admission)
    guarded: Any = guard_function(view, admission.admit)
    guarded.meterly_costs = any_costs(
        admission.costs, getattr(view, "meterly_costs", None)
    )
    return guarded  # type: ignore[no-any-return]


def _refuse_unless_view(view: Any) -> None:
    if isclass(view):
        raise TypeError(
            f"meterly_guard guards a view function. Guard {view.__name__}.as_view() "
            "in the URLconf instead of the class, or use MeterlyGuardMixin."
        )
    if not callable(view):
        raise TypeError(f"meterly_guard guards a view function, not {view!r}.")
    if is_ninja_operation(getattr(view, "_ninja_operation", None)):
        # ninja calls the function that it was given, and not a wrapper around it.
        raise TypeError(_ABOVE_NINJA.format(view.__name__))


_ABOVE_NINJA = (
    "meterly_guard guards nothing on {0}, which is an operation of django-ninja "
    "already: ninja calls it without the guard. Put "
    "@decorate_view(meterly_guard(...)) below @api.post(...)."
)
