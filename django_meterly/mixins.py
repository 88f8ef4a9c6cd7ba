"""``MeterlyGuardMixin``: class-based views that run only when they are paid for."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from django.views.generic.edit import FormMixin

from .execution import guard_class, handlers, install_guards, is_guarded, is_rest
from .guards import Guard
from .options import near_miss, read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.http import HttpRequest


class MeterlyGuardMixin:
    """Guard the handlers of a class-based view, of Django or of Django REST framework.

    ::

        class Poster(MeterlyGuardMixin, View):
            guard_options = {"unit": "image_credits", "amount": 25}

    ``guard_options`` has the names and values of ``meterly_guard``'s arguments, and
    guards whichever handler a request selects, once ``dispatch()`` calls it: log-in
    mixins, permissions and throttles come first and cost nothing. Without them, only
    the handlers guarded by ``@meterly_guard`` cost something. A form that does not
    validate is free: ``form_invalid()`` shows it again with status 200, and the credits
    are released. Under ``ATOMIC_REQUESTS`` the guard opens the transaction, around the
    handler; requests that no guarded handler answers have it around all, as ever.

    ``as_view()`` raises ``TypeError`` and ``ValueError`` for options out of bounds, and
    ``TypeError`` for an attribute that was to be ``guard_options``: ``guards_options``,
    for example.
    """

    guard_options: Mapping[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if base is MeterlyGuardMixin:
                return
            if "as_view" in vars(base) and not issubclass(base, MeterlyGuardMixin):
                raise TypeError(
                    f"Name MeterlyGuardMixin before {base.__name__} among the bases of "
                    f"{cls.__name__}: it would not guard anything."
                )

    @classmethod
    def as_view(cls, *args: Any, **initkwargs: Any) -> Any:
        view = super().as_view(*args, **initkwargs)  # type: ignore[misc]
        mapping = initkwargs.get("guard_options", cls.guard_options)
        if name := near_miss(cls, guarded=mapping is not None or is_guarded(view)):
            raise TypeError(
                f"{cls.__qualname__}.{name} guards nothing. Did you mean "
                "guard_options? For example: "
                'guard_options = {"unit": "image_credits", "amount": 25}'
            )
        if mapping is None:
            return guard_class(view, None)
        where = f"{cls.__qualname__}.guard_options"
        options = read_mapping(mapping, where, handlers(view))
        guarded: Any = guard_class(view, lambda request: options)
        guarded.meterly_options = options
        return guarded

    def setup(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().setup(request, *args, **kwargs)  # type: ignore[misc]
        # In Django REST framework initial() comes later, and knows who asks.
        if not is_rest(type(self)):
            install_guards(self, request)  # type: ignore[arg-type]
        if isinstance(self, FormMixin):
            self.form_invalid = _free(self.form_invalid, request)


def _free(form_invalid: Any, request: HttpRequest) -> Any:
    """Return *form_invalid*, which shows a form again, and lets that be free."""

    @wraps(form_invalid)
    def free_form_invalid(form: Any) -> Any:
        guard = getattr(request, "meterly", None)
        if isinstance(guard, Guard):
            # Before: it may say itself what that costs.
            guard.release()
        return form_invalid(form)

    return free_form_invalid
