"""``MeterlyGuardMixin``: class-based views that run only when they are paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.views.generic.edit import FormMixin

from .guards import Guard
from .options import near_miss, read_mapping
from .views import patches
from .views.admission import Admission, refuse_dispatch
from .views.classes import guard_class, install_guards
from .views.introspection import handlers, is_guarded, is_rest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.http import HttpRequest


class MeterlyGuardMixin:
    """Guard the handlers of a class-based view, of Django or of Django REST framework.

    ::

        class Poster(MeterlyGuardMixin, View):
            guard_options = {"unit": "image_credits", "amount": 25}

    ``guard_options`` has the names and values of ``meterly_guard``'s arguments. It
    guards the handler that answers a request, for example ``post()``. The guard begins
    when ``dispatch()`` calls the handler. So log-in mixins, permissions and throttles
    come first, and a request that they refuse is free. Without
    ``guard_options``, only the handlers with ``@meterly_guard`` cost something.

    A form that does not validate is free: ``form_invalid()`` shows it again with status
    200, and the credits are released. Under ``ATOMIC_REQUESTS`` the guard opens the
    transaction, around the handler. If no guarded handler answers the request, the
    transaction is around the whole view, as in Django.

    ``as_view()`` raises ``TypeError`` and ``ValueError`` for invalid options, and
    ``TypeError`` for a misspelt ``guard_options``: ``guards_options``, for example.
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
        if getattr(cls.dispatch, "meterly_guarded", False):  # type: ignore[attr-defined]
            refuse_dispatch()
        if mapping is None:
            return guard_class(view, None)
        where = f"{cls.__qualname__}.guard_options"
        options = read_mapping(mapping, where, handlers(view))
        guarded: Any = guard_class(view, Admission(view, lambda request: options))
        guarded.meterly_options = options
        return guarded

    def setup(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().setup(request, *args, **kwargs)  # type: ignore[misc]
        # Views of Django REST framework do it in initial(), which authenticates.
        if not is_rest(type(self)):
            install_guards(self, request)  # type: ignore[arg-type]
        if isinstance(self, FormMixin):
            patches.extend_form_invalid(self, lambda: _release(request))


def _release(request: HttpRequest) -> None:
    guard = getattr(request, "meterly", None)
    if isinstance(guard, Guard):
        guard.release()
