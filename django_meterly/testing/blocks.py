"""Blocks of a test: ``with``, ``async with`` and decorators."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from unittest import TestCase

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.test.utils import TestContextDecorator, override_settings

from ..conf import DEFAULTS, meterly_settings, unknown_setting
from ..errors import MeterlyUsageError
from ..models import Customer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


class Block(TestContextDecorator, Generic[T]):
    """A block of a test: ``with``, ``async with``, or a decorator.

    It decorates functions, ``async`` functions and classes of tests. A decorator enters
    a copy of its block for each call, and for each test of a class.
    """

    #: The arguments of a function that returns the owner: the test, if there is one.
    _arguments: tuple[Any, ...] = ()
    #: A block remembers one start, so it cannot start again before it ends.
    _entered = False
    #: Whether the block also ends after an exception: it may have something to undo.
    _ends_after_an_exception = True

    def enable(self) -> T:
        raise NotImplementedError

    def __enter__(self) -> T:  # type: ignore[override]
        name = type(self).__name__
        if self._entered:
            raise entered_twice(name)
        try:
            begun = self.enable()
        except SynchronousOnlyOperation as exc:
            raise SynchronousOnlyOperation(
                f"In async code, write 'async with {name}(...)'."
            ) from exc
        self._entered = True
        return begun

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = False
        if exc_type is None or self._ends_after_an_exception:
            self.disable()

    async def __aenter__(self) -> T:
        return await sync_to_async(self.__enter__)()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await sync_to_async(self.__exit__)(exc_type, exc, traceback)

    def decorate_callable(self, func: F) -> F:
        wrapper: Any
        if iscoroutinefunction(func):

            @wraps(func)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                async with self._for(*args[:1]):
                    return await func(*args, **kwargs)

        else:

            @wraps(func)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self._for(*args[:1]):
                    return func(*args, **kwargs)

        return cast("F", wrapper)

    def decorate_class(self, cls: C) -> C:
        if not issubclass(cls, TestCase):
            raise TypeError(
                f"{type(self).__name__} decorates functions and subclasses of "
                f"unittest.TestCase, not {cls!r}."
            )
        set_up: Any = cls.setUp

        @wraps(set_up)
        def wrapper(test: Any) -> None:
            # After setUp(), which may create the owner.
            set_up(test)
            block = self._for(test)
            block.__enter__()
            test.addCleanup(block.__exit__, None, None, None)

        cast("Any", cls).setUp = wrapper
        return cast("C", cls)

    def _for(self, *arguments: Any) -> Self:
        block = copy(self)
        block._entered = False
        block._arguments = arguments
        return block

    def _customer(self, owner: Any) -> Customer:
        if callable(owner):
            owner = owner(*self._arguments)
        return Customer.objects.resolve(owner)


def entered_twice(name: str) -> MeterlyUsageError:
    return MeterlyUsageError(
        f"This {name}(...) has been entered already: write a second {name}(...) for "
        "the block inside."
    )


class override_meterly(override_settings):  # noqa: N801
    """Change some of ``settings.METERLY`` in a block, and keep the rest.

    ``override_settings(METERLY={...})`` replaces the whole dict. This merges::

        with override_meterly(ENFORCEMENT="off"):
            ...

    It decorates what ``override_settings`` decorates. Raises ``ImproperlyConfigured``
    for a name that is not a setting, and ``MeterlyUsageError`` if one object is entered
    twice at once.
    """

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in DEFAULTS:
                raise ImproperlyConfigured(unknown_setting(name))
        super().__init__()
        self._values = values

    def enable(self) -> None:
        if hasattr(self, "wrapped"):
            # Django would lose the first settings.
            raise entered_twice(type(self).__name__)
        self.options = {"METERLY": {**meterly_settings.as_dict(), **self._values}}
        super().enable()

    def save_options(self, test_func: Any) -> None:
        # A class keeps its overrides until its tests run.
        saved = test_func._overridden_settings or {}
        before = saved.get("METERLY", meterly_settings.as_dict())
        self.options = {"METERLY": {**before, **self._values}}
        super().save_options(test_func)
