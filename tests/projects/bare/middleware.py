from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.projects.bare.models import Person

if TYPE_CHECKING:
    from collections.abc import Callable


class PersonMiddleware:
    """Believes the header ``X-Person``, as behind a proxy that sets it."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        name = request.headers.get("X-Person")
        request.user = Person.objects.filter(name=name).first()
        return self.get_response(request)
