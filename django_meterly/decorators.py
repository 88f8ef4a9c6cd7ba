"""``meterly_guard``: a view that runs only when it is paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from .options import GuardOptions, shows
from .views.guarding import guard_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from django.http.response import HttpResponseBase

    View = Callable[..., Any]


@shows('@meterly_guard("image_credits", 25)')
def meterly_guard(
    unit: str | None = None,
    amount: int | Callable[..., Any] = 1,
    *,
    customer: Callable[..., Any] | None = None,
    reference: str | Callable[..., Any] | None = None,
    idempotency_key: Callable[..., Any] | None = None,
    ttl_seconds: int | None = None,
    methods: Iterable[str] | None = None,
    success: Callable[[HttpResponseBase], bool] | None = None,
    overage: str | None = None,
    on_disconnect: str | None = None,
    on_unavailable: str | None = None,
    enforcement: str | None = None,
) -> Callable[[View], View]:
    """Guard a view: reserve credits, run it, then commit or release.

    ::

        @meterly_guard("image_credits", 25)
        def render(request): ...

    The view may be sync or async. *unit* defaults to ``DEFAULT_UNIT``; a request to a
    view whose unit ``UNITS`` does not declare is a ``ValueError``. *amount*,
    *customer*, *reference* and *idempotency_key* may be callables, sync or async;
    they get the view's arguments. The customer is who ``CUSTOMER_RESOLVER``
    finds, the logged-in user by default; when there is none, a browser is sent to
    the log-in page and everybody else gets 401. Every HTTP method costs something
    except GET, HEAD and OPTIONS; *methods* adds GET (and with it HEAD) or HEAD. A
    guarded function does not run for OPTIONS, which is answered with ``Allow``, or
    for TRACE. *success* decides by the response: a status below 400 by default.
    *overage*, *on_disconnect*, *on_unavailable* and *enforcement* stand above the
    settings of these names.

    Too few credits are answered by 402, a ledger that cannot be asked by 503,
    a used idempotency key by 409; the view does not run then. While it runs,
    ``request.meterly`` is its ``Guard``.

    Under ``ATOMIC_REQUESTS`` the guard opens the view's transaction itself,
    after the credits are reserved, and records success in it as its last
    statement, so that the work and its charge are committed together or not
    at all. The return of the view decides: a response that is still to be rendered
    is charged when that is done, also if its reader has left, and released if
    rendering raises. A stream is charged after its last chunk. *on_disconnect*
    (``"charge"`` or ``"release"``) decides for a stream whose reader leaves and for
    an async view that is cancelled.

    Raises ``ValueError`` and ``TypeError`` for options out of bounds when the
    view is defined.
    """
    options = GuardOptions(
        unit=unit,
        amount=amount,
        customer=customer,
        reference=reference,
        idempotency_key=idempotency_key,
        ttl_seconds=ttl_seconds,
        methods=methods,
        success=success,
        overage=overage,
        on_disconnect=on_disconnect,
        on_unavailable=on_unavailable,
        enforcement=enforcement,
    )

    options.fit()
    return _Decorator(options)


class _Decorator:
    """What ``meterly_guard()`` returns: it makes a guarded view of a view."""

    def __init__(self, options: GuardOptions) -> None:
        self.options = options

    def __call__(self, view: View) -> View:
        options = self.options
        guarded: Any = guard_view(view, lambda request: options)
        options.fit(view)
        guarded.meterly_options = options
        return guarded  # type: ignore[no-any-return]

    # So that a block under it is told what guards a block.

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
