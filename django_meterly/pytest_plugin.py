"""Fixtures for pytest, by the entry point ``meterly``. See ``testing``.

Every run of pytest imports this module, so it imports Django in its fixtures only.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .models import Customer
    from .testing import faults


@pytest.fixture
def meterly_credits(db: None) -> Iterator[Callable[..., Customer]]:
    """Give credits until the test ends: ``meterly_credits(user, image_credits=100)``.

    See ``django_meterly.testing.override_credits``.
    """
    from .testing import override_credits

    with ExitStack() as stack:
        yield lambda owner, /, **units: stack.enter_context(
            override_credits(owner, **units)
        )


@pytest.fixture
def meterly_faults(settings: Any) -> Iterator[faults]:
    """Let calls to the ledger fail until the test ends: ``meterly_faults.meet(...)``.

    See ``django_meterly.testing.faults``.
    """
    from .conf import meterly_settings
    from .testing import faults

    # By pytest-django's fixture, which also undoes later changes of a test in order.
    settings.METERLY = {
        **meterly_settings.as_dict(),
        "TRANSPORT": "django_meterly.testing.FaultyTransport",
    }
    with faults() as line:
        yield line


@pytest.fixture
def meterly_books(db: None) -> Iterator[None]:
    """Check when the test ends that the books balance.

    See ``django_meterly.testing.assert_books_balance``.
    """
    from .testing import assert_books_balance

    yield
    assert_books_balance()
