"""Options as people write them: mistakes in keywords, and options in mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import SequenceMatcher
from functools import wraps
from inspect import Parameter, Signature, getattr_static, signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.utils.module_loading import import_string

from .conf import suggestion
from .policies import ViewOptions

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


def shows(
    example: str, keywords: Any = None, *, others: bool = False
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that ends what a function refuses with a right call of it.

    *keywords* is the ``TypedDict`` of its ``**options``: any other name is refused,
    unless the function takes *others*. For example, an unknown keyword is answered by
    "meterly_guard() got an unexpected keyword argument 'ammount'. Did you mean
    'amount'? For example: " and *example*. Only for functions that do nothing but check
    their arguments.
    """

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        parameters = _named(function, keywords, others=others)
        known = parameters.parameters

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                for name in kwargs if keywords and not others else ():
                    if name not in known:
                        raise TypeError(
                            f"{function.__name__}() got an unexpected keyword argument "
                            f"{name!r}"
                        )
                return function(*args, **kwargs)
            except (TypeError, ValueError) as exc:
                if type(exc) not in (TypeError, ValueError):
                    # An error of this package, whose message is complete.
                    raise
                # From Python 3.13 on, Python itself may have suggested a name.
                hint = "".join(
                    suggestion(name, known)
                    for name in kwargs
                    if name not in known
                    and f"{name!r}" in str(exc)
                    and "Did you mean" not in str(exc)
                )
                refused = type(exc)(f"{_sentence(exc)}{hint} For example: {example}")
            raise refused

        # help() and editors show the keywords by their names.
        call.__signature__ = parameters  # type: ignore[attr-defined]
        return call

    return decorator


def _named(function: Any, keywords: Any, *, others: bool) -> Signature:
    """Return the signature of *function*, its ``**options`` spelled out."""
    found = signature(function)
    *plain, last = found.parameters.values()
    if keywords is None:
        return found
    spelled = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            # Postponed annotations are ForwardRefs; a function's own are texts.
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in keywords.__annotations__.items()
    ]
    rest = [last] if others else []
    return found.replace(parameters=[*plain, *spelled, *rest])


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return text if text.endswith((".", "?")) else f"{text}."


def read_mapping(
    mapping: Mapping[str, Any],
    where: str,
    views: Mapping[str, Callable[..., Any]] | None = None,
) -> ViewOptions:
    """Return the options that *mapping* names, as ``meterly_guard`` names them.

    Functions may be dotted paths, because settings files cannot import them. For
    example, ``{"amount": "studio.prices.of_poster"}``. A *reference* is a text or a
    function. The functions have to fit those of the *views*, by their HTTP methods,
    that cost something. The messages of the ``TypeError``, ``ValueError`` or
    ``ImportError`` begin with *where* the mapping stands.
    """
    if not hasattr(mapping, "items"):
        raise TypeError(
            f"{where} must be a dict of options, not {mapping!r}. For example: "
            f"{_MAPPING}"
        )
    known = {field.name: field for field in fields(ViewOptions)}
    # For the message: those that everybody needs come first.
    names = sorted(known, key=lambda name: name not in ("unit", "amount"))
    values = dict(mapping)
    for name in values:
        if name not in known:
            raise TypeError(
                f"{where}: there is no option {name!r}."
                + (
                    suggestion(str(name), known)
                    or f" The options are {', '.join(names)}."
                )
                + f" For example: {_MAPPING}"
            )
    try:
        for name, value in values.items():
            if known[name].metadata["path"] and isinstance(value, str):
                values[name] = _imported(name, value)
        options = ViewOptions(**values)
        options.fit()
        for method, view in (views or {}).items():
            if options.costs(method.upper()):
                options.fit(view)
    except ImportError as exc:
        raise ImportError(f"{where}: {exc}") from exc
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"{where}: {_sentence(exc)} For example: {_MAPPING}") from exc
    return options


def _imported(name: str, path: str) -> Any:
    try:
        return import_string(path)
    except ImportError as exc:
        number = "a number, " if name == "amount" else ""
        raise ImportError(
            f"{name} must be {number}a function or its dotted path, not {path!r}: {exc}"
        ) from exc


def near_miss(cls: type, *, guarded: bool) -> str | None:
    """Return the name of an attribute of *cls* that was meant to be ``guard_options``.

    For example ``guards_options``; or ``options`` for a dict of a ``"unit"`` and an
    ``"amount"``, if the class is not *guarded* otherwise. Other attributes belong to
    the class: ``render_options`` with a ``"unit"``, for example.
    """
    known = {field.name for field in fields(ViewOptions)}
    for name in dir(cls):
        if name == "guard_options" or name.startswith("_" if guarded else "__"):
            continue
        value = getattr_static(cls, name)
        if not isinstance(value, Mapping) or not value or not set(value) <= known:
            continue
        likeness = SequenceMatcher(None, name.lower(), "guard_options").ratio()
        remembered = likeness >= _SIMILAR or "guard" in name.lower()
        if likeness >= _SAME_WORD or (
            not guarded and remembered and {"unit", "amount"} <= set(value)
        ):
            return name
    return None


#: How much of ``guard_options`` is in a name with a typo, and in a name that somebody
#: remembered badly: ``guards_options`` and ``meterly_options``.
_SAME_WORD, _SIMILAR = 0.9, 0.6
#: A right mapping, for messages.
_MAPPING = '{"unit": "image_credits", "amount": 25}'
