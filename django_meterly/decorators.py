"""``meterly_guard``: a view that runs only if it is paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from .options import shows
from .policies import ViewKeywords, ViewOptions
from .views.guarding import guard_view

if TYPE_CHECKING:
    from collections.abc import Callable

    View = Callable[..., Any]


@shows('@meterly_guard("image_credits", 25)', ViewKeywords)
def meterly_guard(
    unit: str | None = None,
    amount: int | Callable[..., Any] = 1,
    **options: Unpack[ViewKeywords],
) -> Callable[[View], View]:
    """Guard a view: reserve credits, run it, then commit or release.

    ::

        @meterly_guard("image_credits", 25)
        def render(request): ...

    The view may be sync or async. ``Policies``, ``WorkOptions`` and ``ViewOptions`` in
    ``django_meterly.policies`` explain the options. The ``CUSTOMER_RESOLVER`` finds out
    who pays: the logged-in user by default. If nobody is logged in, a browser is sent
    to the log-in page and other clients get 401.

    The view does not run, and the guard answers

    - 402 if there are too few credits,
    - 503 if the ledger cannot be asked,
    - 409 if the idempotency key was used.

    While the view runs, ``request.meterly`` is its ``Guard``. A guarded function never
    runs for OPTIONS and TRACE: the guard answers them.

    Under ``ATOMIC_REQUESTS`` the guard opens the view's transaction itself, after the
    credits are reserved, and records success in it as the last statement. So the work
    and its charge are committed together or not at all. A template response is charged
    when it is rendered, even if its reader has left. If rendering raises, the credits
    are released. A stream is charged after its last chunk.

    Raises ``ValueError`` and ``TypeError`` for invalid options when the view is
    defined. A request to a view whose unit ``UNITS`` does not declare raises
    ``ValueError``.
    """
    checked = ViewOptions(unit=unit, amount=amount, **options)
    checked.fit()
    return _Decorator(checked)


class _Decorator:
    """What ``meterly_guard()`` returns: it makes a guarded view of a view."""

    def __init__(self, options: ViewOptions) -> None:
        self.options = options

    def __call__(self, view: View) -> View:
        options = self.options
        guarded: Any = guard_view(view, lambda request: options)
        options.fit(view)
        guarded.meterly_options = options
        return guarded  # type: ignore[no-any-return]

    # Somebody may use it as a block: the error names guard().

    def __enter__(self) -> NoReturn:
        raise TypeError(_A_VIEW.format("with"))

    async def __aenter__(self) -> NoReturn:
        raise TypeError(_A_VIEW.format("async with"))

    def __exit__(self, *exc_info: object) -> None: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


_A_VIEW = (
    "meterly_guard() guards a view. For a block of code, write {} "
    'guard(user, 25, "image_credits"): ...'
)
