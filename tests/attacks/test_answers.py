"""What is made of a ledger's answers that are wrong, whichever transport has them."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import json
import logging
import pickle
import re
import time
from dataclasses import fields, is_dataclass
from html import unescape
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import strategies as st

from django_meterly import MeterlyClient, get_client, grants, guard, journal, signals
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyCustomerExistsError,
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyRateLimitedError,
    MeterlyUnavailableError,
    MeterlyUnknownOutcomeError,
    api_error,
)
from django_meterly.ledger.models import Entry
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Customer, Grant, Reservation
from django_meterly.testing import (
    Altered,
    assert_books_balance,
    faults,
    lapse_leases,
    sweep,
)
from django_meterly.transports import Call, Transport
from django_meterly.wire import MAX_AMOUNT
from tests.books import balance, fund, movements, states
from tests.children import ROOT
from tests.transports.server import KEY, Server, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.contrib.auth.models import User
    from django.test import Client

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

MISSING = object()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


#: What no field of an answer can be, but for a few that some may be.
NONSENSE: list[Any] = [
    *(True, False, 0, 1, 7, -1, -5, 2**63, -(2**63), 10**5000, 10**30),
    *(1.0, 5.0, 1.5, 1e999, -1e999, float("nan")),
    *("", " ", "5", "-5", "free", "None", "true", "cus_other", "res_other"),
    *("a b", "a\n", "\n", "a\nb", "\x00", "a\x00b", "\x1b[31m", "\x7f", "\x85"),
    *("\ud800", "\udfff\ud800", "\u2028", "\u202e", "\ufeff", "é", "🎉", "٣"),
    *(
        "../../v1/grants",
        "..",
        "/",
        "%2e%2e",
        "a/b",
        "x" * 65,
        "x" * 256,
        "x" * 900_000,
    ),
    *("reserved", "committed", "released", "expired", "Reserved", "done"),
    *("2026-01-01", "2026-01-01T00:00:00", "2026-01-01T00:00:00+01:00"),
    *("2026-02-30T00:00:00Z", "2026-01-01 00:00:00Z", "2026-01-01T00:00:60Z", "now"),
    *([], {}, [1], {"a": 1}, [{}], ["reserved"], {"creditUnit": "tokens"}),
    *(nested(200), nested(50_000), b"bytes", dt.datetime(2026, 1, 1), object()),
]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=80),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=20), inner, max_size=4)
    ),
    max_leaves=8,
)
ANYTHING = st.sampled_from(NONSENSE) | JSON | st.just(MISSING)

PROPERTY = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def shows(value: object) -> str:
    return f"{type(value).__name__}-{value!r:.24}" if _is_plain(value) else "object"


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | float | str | bytes) or (
        isinstance(value, int) and value.bit_length() < 100
    )


# The client


class Answering(Transport):
    """Answers with *body*, or raises it."""

    def __init__(self, body: Any = None) -> None:
        self.body = body

    def send(self, call: Call) -> Any:
        if isinstance(self.body, BaseException):
            raise self.body
        return self.body


class Recording(LedgerTransport):
    """The embedded ledger; *bodies* are its answers, by operation."""

    def __init__(self) -> None:
        self.bodies: dict[str, dict[str, Any]] = {}

    def send(self, call: Call) -> dict[str, Any]:
        body = super().send(call)
        self.bodies[call.operation] = copy.deepcopy(body)
        return body


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: The fields of each answer that say what the call has named.
NAMED = {
    "create_customer": {"customerExternalId", "creditUnit"},
    "find_customer": {"customerExternalId"},
    "grant_credits": {"creditAmount", "creditUnit", "reference"},
    "get_balance": {"customerId"},
    "get_balances": {"customerId"},
    "list_entries": {"unit"},
    "add_credits": {"customerId", "amount", "unit", "creditUnit", "reference"},
    "use_credits": {"customerId", "amount", "unit", "creditUnit", "reference"},
    "reserve_credits": {"customerId", "amount", "unit", "creditUnit", "reference"},
    "get_reservation": {"reservationId"},
    "extend_reservation": {"reservationId"},
    "commit_reservation": {"reservationId", "status"},
    "release_reservation": {"reservationId", "status"},
}
READS = {
    "find_customer",
    "get_balance",
    "get_balances",
    "list_entries",
    "get_reservation",
}
#: The least that each method takes for an answer.
LEAST: dict[str, dict[str, Any]] = {
    "create_customer": {"customerId": "cus_1"},
    "find_customer": {"customers": [{"customerId": "cus_1"}]},
    "grant_credits": {"grant": {"customerId": "cus_1"}},
    "get_balance": {"creditUnit": "tokens", "available": 5},
    "get_balances": {"balances": [{"creditUnit": "tokens", "available": 5}]},
    "list_entries": {"entries": [{}]},
    "add_credits": {},
    "use_credits": {},
    "reserve_credits": {"reservationId": "res_1"},
    "get_reservation": {},
    "extend_reservation": {},
    "commit_reservation": {},
    "release_reservation": {},
}


@pytest.fixture
def asked() -> tuple[dict[str, Arguments], dict[str, dict[str, Any]]]:
    """Each method's arguments, and what the embedded ledger answers to them."""
    transport = Recording()
    client = MeterlyClient(transport=transport)
    customer = client.grant_credits("user_0", 100, "tokens", "r").grant.customer_id
    client.add_credits(customer, 5, "seconds")
    held, other = (client.reserve_credits(customer, 9).reservation_id for _ in "ab")
    arguments: dict[str, Arguments] = {
        "create_customer": (("user_1", "tokens"), {}),
        "find_customer": (("user_0",), {}),
        "grant_credits": (("user_0", 4, "tokens", "order-1", "Danke é"), {}),
        "get_balance": ((customer,), {}),
        "get_balances": ((customer,), {}),
        "list_entries": ((customer, "tokens"), {}),
        "add_credits": ((customer, 4, "tokens", "job"), {}),
        "use_credits": ((customer, 4, "tokens", "job"), {}),
        "reserve_credits": (
            (customer, 4),
            {"unit": "tokens", "reference": "job", "ttl_seconds": 60},
        ),
        "get_reservation": ((held,), {}),
        "extend_reservation": ((held, 60), {}),
        "commit_reservation": ((held,), {"amount": 5}),
        "release_reservation": ((other,), {}),
    }
    for operation, (args, kwargs) in arguments.items():
        getattr(client, operation)(*args, **kwargs)
    return arguments, transport.bodies


def paths(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Name every field of a body, those inside others included."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield (*so_far, name)
        yield from paths(inner, (*so_far, name))


def altered(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return *body* with another *value* at *path*, or without one."""
    body = copy.deepcopy(body)
    if not path:
        return None if value is MISSING else value
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    if value is not MISSING:
        holder[path[-1]] = value
    elif path[-1] in holder or isinstance(holder, list):
        del holder[path[-1]]
    return body


def is_sane(value: Any) -> bool:
    """Whether a result has nothing in it that a field cannot be."""
    if is_dataclass(value):
        return all(
            (f.name == "description" and isinstance(getattr(value, f.name), str))
            or (f.name == "replayed" and type(getattr(value, f.name)) is bool)
            or is_sane(getattr(value, f.name))
            for f in fields(value)
        )
    if isinstance(value, tuple):
        return all(map(is_sane, value))
    if isinstance(value, str):
        return value.isascii() and value.isprintable() and 1 <= len(value) <= 255
    if isinstance(value, dt.datetime):
        return value.utcoffset() == dt.timedelta(0)
    return value is None or (type(value) is int and abs(value) <= MAX_AMOUNT)


def outcome_of(call: Callable[[], Any]) -> Any:
    """Return the result of *call*, or the unknown outcome that it raises."""
    try:
        return call()
    except MeterlyUnknownOutcomeError as exc:
        error = exc
    assert type(error) is MeterlyUnknownOutcomeError
    text = str(error)
    assert text.isprintable()
    assert len(text) < 400
    return text


def check_outcome(
    operation: str, body: Any, path: tuple[Any, ...], value: Any, outcome: Any
) -> None:
    if isinstance(outcome, str):
        # It says which field is wrong.
        names = [name for name in path if isinstance(name, str)]
        # Its balance has to be of the same account.
        names += ["balance: "]
        assert not path or any(name in outcome for name in names), outcome
        return
    # The right answer, or one without a field, or one with a field that nobody named.
    assert outcome is None or is_sane(outcome), outcome
    if path and path[-1] in NAMED[operation] and value is not MISSING:
        sane = body
        for name in path:
            sane = sane[name]
        assert value is None or (type(value) is type(sane) and value == sane)


@pytest.mark.parametrize("operation", NAMED)
def test_f51_every_field_that_is_wrong_makes_the_outcome_unknown(
    asked: Any, operation: str
) -> None:
    (args, kwargs), body = asked[0][operation], asked[1][operation]
    transport = Answering()
    client = MeterlyClient(transport=transport)
    method = getattr(client, operation)
    transport.body = body
    assert is_sane(method(*args, **kwargs))
    transport.body = {**body, "more": nested(50_000), "\ud800": "\x00"}
    assert is_sane(method(*args, **kwargs))
    tried = 0
    for path in [(), *paths(body)]:
        for value in [*NONSENSE, None, MISSING]:
            transport.body = altered(body, path, value)
            outcome = outcome_of(lambda: method(*args, **kwargs))
            check_outcome(operation, body, path, value, outcome)
            tried += isinstance(outcome, str)
    assert tried > 20 * len(body)


@PROPERTY
@hypothesis.given(data=st.data())
def test_f51_whatever_a_field_says_nothing_wrong_is_believed(
    asked: Any, data: st.DataObject
) -> None:
    operation = data.draw(st.sampled_from(sorted(NAMED)))
    (args, kwargs), body = asked[0][operation], asked[1][operation]
    path = data.draw(st.sampled_from([(), *paths(body)]))
    value = data.draw(ANYTHING)
    client = MeterlyClient(transport=Answering(altered(body, path, value)))
    outcome = outcome_of(lambda: getattr(client, operation)(*args, **kwargs))
    check_outcome(operation, body, path, value, outcome)


@pytest.mark.parametrize("operation", NAMED)
def test_f51_async_twins_check_the_same(asked: Any, operation: str) -> None:
    (args, kwargs), body = asked[0][operation], asked[1][operation]
    transport = Answering()
    client = MeterlyClient(transport=transport)

    async def both() -> None:
        for path in [(), *paths(body)]:
            for value in (True, "-5", "cus_other", "\x00", {}, None, MISSING):
                transport.body = altered(body, path, value)
                expected = outcome_of(
                    lambda: getattr(client, operation)(*args, **kwargs)
                )
                try:
                    result = await getattr(client, f"a{operation}")(*args, **kwargs)
                except MeterlyUnknownOutcomeError as exc:
                    result = str(exc)
                assert result == expected

    asyncio.run(both())


@pytest.mark.parametrize("operation", NAMED)
def test_f51_fields_that_the_guide_does_not_show_may_be_absent(
    asked: Any, operation: str
) -> None:
    (args, kwargs), body = asked[0][operation], asked[1][operation]
    least = LEAST[operation]
    transport = Answering(least)
    method = getattr(MeterlyClient(transport=transport), operation)
    assert is_sane(method(*args, **kwargs))
    # One by one, absent or null: it is the least, and not less, that is needed.
    needed = set(paths(least))
    for path in paths(body):
        if path[-1] == 1 or 1 in path:
            continue
        for nothing in (None, MISSING):
            transport.body = altered(body, path, nothing)
            outcome = outcome_of(lambda: method(*args, **kwargs))
            in_balance = "balance" in path[:-1] and path[-1] in (
                "creditUnit",
                "available",
            )
            item = isinstance(path[-1], int)
            if item and nothing is MISSING:
                continue
            if path in needed or in_balance or item:
                assert isinstance(outcome, str), path
            else:
                assert is_sane(outcome), path


@pytest.mark.parametrize("operation", sorted(NAMED.keys() - READS))
def test_f51_wrong_answer_names_the_key_of_a_change(asked: Any, operation: str) -> None:
    args, kwargs = asked[0][operation]
    client = MeterlyClient(transport=Answering([]))
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        getattr(client, operation)(*args, **kwargs, idempotency_key="key")
    assert caught.value.idempotency_key == "key"


@pytest.mark.parametrize(
    ("operation", "change"),
    [
        ("reserve_credits", {"customerId": "cus_other"}),
        ("reserve_credits", {"amount": 1}),
        ("reserve_credits", {"amount": 4.0}),
        ("reserve_credits", {"unit": "free"}),
        ("reserve_credits", {"amount": "-5"}),
        ("reserve_credits", {"reference": "another"}),
        ("reserve_credits", {"reservationId": "../../v1/grants"}),
        ("commit_reservation", {"status": "released"}),
        ("commit_reservation", {"status": "reserved"}),
        ("commit_reservation", {"status": "expired"}),
        ("commit_reservation", {"reservationId": "res_other"}),
        ("commit_reservation", {"amount": 4}),
        ("release_reservation", {"status": "committed"}),
        ("extend_reservation", {"reservationId": "res_other"}),
        ("get_balance", {"customerId": "cus_other"}),
        ("get_balances", {"customerId": "cus_other"}),
        ("create_customer", {"customerExternalId": "user_2"}),
        ("create_customer", {"creditUnit": "seconds"}),
    ],
)
def test_f51_answer_to_something_else_is_unknown_and_says_so(
    asked: Any, operation: str, change: dict[str, Any]
) -> None:
    (args, kwargs), body = asked[0][operation], asked[1][operation]
    client = MeterlyClient(transport=Answering({**body, **change}))
    [(name, value)] = change.items()
    with pytest.raises(MeterlyUnknownOutcomeError, match=rf"{name} .*\b") as caught:
        getattr(client, operation)(*args, **kwargs)
    assert str(value) in str(caught.value)


def test_f51_two_customers_of_one_external_id_are_no_answer(asked: Any) -> None:
    body = asked[1]["find_customer"]
    client = MeterlyClient(transport=Answering({"customers": body["customers"] * 2}))
    with pytest.raises(MeterlyUnknownOutcomeError, match="2 items"):
        client.find_customer("user_0")
    client = MeterlyClient(transport=Answering({"customers": []}))
    assert client.find_customer("user_0") is None


@pytest.mark.parametrize("body", [None, [], "x", 5, True, b"{}", object()], ids=shows)
def test_f51_body_that_is_no_object_is_unknown(asked: Any, body: Any) -> None:
    client = MeterlyClient(transport=Answering(body))
    for operation, (args, kwargs) in asked[0].items():
        with pytest.raises(MeterlyUnknownOutcomeError, match="must be an object"):
            getattr(client, operation)(*args, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-01T00:00:00Z",
        "2026-01-01T00:00:00.5Z",
        "2026-01-01T00:00:00.123456Z",
        "2026-01-01T00:00:00.123456789Z",
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:00:00-00:00",
    ],
)
def test_times_of_rfc_3339_are_read(asked: Any, text: str) -> None:
    (args, kwargs), body = asked[0]["reserve_credits"], asked[1]["reserve_credits"]
    client = MeterlyClient(transport=Answering({**body, "expiresAt": text}))
    expires_at = client.reserve_credits(*args, **kwargs).expires_at
    assert expires_at is not None
    assert expires_at.replace(microsecond=0) == dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    assert is_sane(expires_at)


def test_replayed_hold_that_has_ended_is_an_answer(asked: Any) -> None:
    for operation in ("reserve_credits", "extend_reservation", "get_reservation"):
        (args, kwargs), body = asked[0][operation], asked[1][operation]
        for status in ("committed", "released", "expired"):
            client = MeterlyClient(transport=Answering({**body, "status": status}))
            result = getattr(client, operation)(*args, **kwargs)
            assert (result.status, result.is_held) == (status, False)


@pytest.mark.parametrize(
    "change", [{"amount": None}, {"unit": None}, {"customerId": 0}]
)
def test_f51_whole_commit_needs_to_know_what_the_hold_is(
    asked: Any, change: dict[str, Any]
) -> None:
    body = {**asked[1]["get_reservation"], **change}
    transport = Answering(body)
    transport.partial_commit = False
    with pytest.raises(MeterlyUnknownOutcomeError):
        MeterlyClient(transport=transport).commit_reservation(
            body["reservationId"], amount=1
        )


def test_f51_client_guard_runs_nothing_for_a_wrong_answer(asked: Any) -> None:
    (args, _), body = asked[0]["reserve_credits"], asked[1]["reserve_credits"]
    ran: list[int] = []
    for path in paths(body):
        for value in (True, -5, "a b", "\x00", "x" * 900_000, [], nested(50_000)):
            client = MeterlyClient(transport=Answering(altered(body, path, value)))
            with pytest.raises(MeterlyUnknownOutcomeError):
                client.guard(*args, "tokens", "job", callback=lambda: ran.append(1))
    assert ran == []


def test_f51_answers_of_wrong_shape_are_an_outage(
    asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (args, _), body = asked[0]["get_balance"], asked[1]["get_balance"]
    transport = Answering({**body, "available": "\n\x1b[2Jx"})
    client = MeterlyClient(transport=transport)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        with pytest.raises(MeterlyUnknownOutcomeError):
            client.get_balance(*args)
    transport.body = body
    client.get_balance(*args)
    first, second = (record.getMessage() for record in caplog.records)
    assert "available" in first
    assert first.isprintable()
    assert second == "The ledger answers again."


def test_checking_an_answer_takes_microseconds(asked: Any) -> None:
    (args, kwargs), body = asked[0]["reserve_credits"], asked[1]["reserve_credits"]
    client = MeterlyClient(transport=Answering(body))
    client.reserve_credits(*args, **kwargs)
    started = time.process_time()
    for _ in range(1000):
        client.reserve_credits(*args, **kwargs)
    # About 0.02 here: a tenth of a millisecond each would be a quarter of a movement.
    assert time.process_time() - started < 0.2


def test_the_docs_transport_of_ones_own_works(asked: Any) -> None:
    page = (ROOT / "docs" / "client.md").read_text("utf-8")
    code = page.partition("## Your own transport")[2].split("```")[1]
    (args, kwargs), body = asked[0]["reserve_credits"], asked[1]["reserve_credits"]
    error = {"code": "insufficient_credits", "message": "no", "available": 1}
    answers: list[Any] = [
        (201, body),
        (201, {**body, "customerId": "cus_2"}),
        (402, {"error": error}),
        TimeoutError("late"),
    ]

    def request(*call: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    names: dict[str, Any] = {"gateway": SimpleNamespace(request=request)}
    exec(code.removeprefix("python"), names)
    client = MeterlyClient(transport=names["GatewayTransport"]())
    assert client.reserve_credits(*args, **kwargs).is_held
    with pytest.raises(MeterlyUnknownOutcomeError, match="customerId is 'cus_2'"):
        client.reserve_credits(*args, **kwargs)
    with pytest.raises(MeterlyInsufficientCreditsError) as caught:
        client.reserve_credits(*args, **kwargs)
    assert caught.value.details == {"available": 1, "required": 4, "unit": "tokens"}
    with pytest.raises(MeterlyUnknownOutcomeError, match="late"):
        client.reserve_credits(*args, **kwargs)


# What a ledger says in its errors


ERROR_CODES = [
    ("insufficient_credits", 402),
    ("customer_exists", 409),
    ("invalid_request", 400),
    ("rate_limited", 429),
    ("not_found", 404),
    ("reservation_expired", 409),
    ("unavailable", 503),
    ("\x00\ud800\n", 418),
    ("x" * 900_000, 402),
]


def check_error(error: MeterlyApiError) -> None:
    """Fail unless *error* can be shown, logged, stored and sent to another process."""
    for text in (str(error), error.message, error.code, error.request_id or ""):
        assert text.isprintable()
        assert len(text) < 3000
        text.encode()
    assert error.message
    shown = json.dumps(error.details, allow_nan=False)
    assert len(shown) < 100_000
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.details) == (str(error), error.details)
    assert json.loads(shown) == error.details
    if isinstance(error, MeterlyInsufficientCreditsError):
        for number in (error.required, error.available, error.reserved):
            assert type(number) is int
            assert 0 <= number <= MAX_AMOUNT
        assert error.unit.isascii()
        assert len(error.unit) <= 64
        assert error.held_by_running_work in (True, False)
    if isinstance(error, MeterlyCustomerExistsError):
        assert all(char.isalnum() or char in "_-" for char in error.customer_id)
        assert len(error.customer_id) <= 64
    if isinstance(error, MeterlyInvalidRequestError):
        for name, texts in error.fields.items():
            assert all(text.isprintable() for text in (name, *texts))
    assert type(error.details.get("retryAfter", 0)) is int


@pytest.mark.parametrize(
    ("code", "status"), ERROR_CODES, ids=lambda value: str(value)[:9]
)
def test_f57_whatever_an_error_says_is_cleaned(code: str, status: int) -> None:
    names = ["required", "available", "reserved", "unit", "customerId", "retryAfter"]
    names += ["fields", "anything", "\x00\n", "x" * 900_000]
    for value in NONSENSE:
        details: Any
        for details in (
            dict.fromkeys(names, value),
            {"fields": {"a": value, "b\n": [value, "x\x00"], "x" * 900_000: []}},
            {f"{number}": value for number in range(5000)},
            value,
        ):
            error = api_error(status, code, value, request_id=value, details=details)
            check_error(error)
            # A transport of one's own may raise the classes themselves.
            check_error(
                type(error)(value, code=value, request_id=value, details=details)
            )


@PROPERTY
@hypothesis.given(
    status=st.sampled_from([400, 401, 402, 403, 404, 409, 418, 422, 429, 500, 503]),
    code=st.sampled_from([code for code, _ in ERROR_CODES]) | JSON,
    message=JSON,
    request_id=JSON,
    details=JSON
    | st.fixed_dictionaries(
        {},
        optional={
            name: ANYTHING.filter(lambda value: value is not MISSING)
            for name in ("required", "available", "unit", "customerId", "retryAfter")
        },
    ),
)
def test_f57_no_error_answer_is_more_than_an_error(
    status: int, code: Any, message: Any, request_id: Any, details: Any
) -> None:
    check_error(
        api_error(status, code, message, request_id=request_id, details=details)
    )


def test_f57_details_that_are_sane_are_kept() -> None:
    details = {
        "required": 5,
        "available": 2,
        "reserved": 1,
        "unit": "tokens",
        "customerId": "cus_1",
        "retryAfter": 3,
        "fields": {"amount": ["Too much."]},
        "hint": "Grüße",
        "final": True,
    }
    assert MeterlyApiError(details=details).details == details


def test_f57_messages_of_every_kind_are_one_bounded_line() -> None:
    for cls in (MeterlyError, MeterlyUnknownOutcomeError, MeterlyUnavailableError):
        text = str(cls("a\n\x00\x1b\ud800\u202eb" + "x" * 900_000))
        assert text.startswith("a     b")
        assert len(text) == 2000


def test_f57_refusal_says_what_was_asked_for() -> None:
    transport = Answering()
    client = MeterlyClient(transport=transport)
    for details, available in (
        ({}, 0),
        ({"required": "x", "available": [], "unit": 5}, 0),
        ({"required": 1, "available": 2, "unit": "free"}, 2),
        # It would not have refused then.
        ({"required": 1000, "available": 5, "unit": "free"}, 0),
    ):
        transport.body = MeterlyInsufficientCreditsError(details=details)
        with pytest.raises(MeterlyInsufficientCreditsError) as caught:
            client.reserve_credits("cus_1", 5, unit="tokens")
        error = caught.value
        assert (error.required, error.unit) == (5, "tokens")
        assert error.available == available


RAW: list[bytes] = [
    b'"\\ud800"',
    b'"\\u0000"',
    b'"a\\nb\\u001b[2J"',
    b'"' + b"x" * 140_000 + b'"',
    b"-5",
    b'"5"',
    b"1e999",
    b"true",
    b"[[[[]]]]",
    b'{"a": {"b": []}}',
    b"[" * 900 + b"]" * 900,
    b"9" * 4000,
    b"null",
]


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: repr(raw[:20]))
@pytest.mark.parametrize(
    ("status", "code"),
    [(402, "insufficient_credits"), (409, "customer_exists"), (429, "rate_limited")],
)
def test_f57_error_bodies_over_http_are_cleaned(
    raw: bytes, status: int, code: str
) -> None:
    names = ("message", "required", "available", "unit", "retryAfter", "customerId")
    details = b", ".join(b'"%s": %s' % (name.encode(), raw) for name in names)
    body = b'{"error": {"code": "%s", %s}, "requestId": %s}' % (
        code.encode(),
        details,
        raw,
    )
    headers = "X-Request-Id: a\x1b[2J\x85b\r\nRetry-After: nonsense\r\n"
    error = over_http(answer(body, f"{status} No", headers=headers))
    assert error.code == code
    check_error(error)


@pytest.mark.parametrize(
    "value",
    ["-1", "nan", "1e9", "9" * 30, "\x85", "\xb2", "Wed, 21 Oct 2065 07:28:00 GMT"],
)
def test_f57_nonsense_in_headers_is_ignored(value: str) -> None:
    body = b'{"error": {"code": "rate_limited", "retryAfter": "soon"}}'
    head = f"HTTP/1.1 429 No\r\nRetry-After: {value}\r\nX-Request-Id: {value}\r\n"
    error = over_http(
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
    )
    assert error.details == {}
    check_error(error)


def over_http(said: bytes) -> MeterlyApiError:
    """Return what becomes of an error that a server says twice: it is asked again."""
    server = Server(lambda connection: connection.sendall(said))
    try:
        with (
            MeterlyClient(KEY, base_url=server.url, max_attempts=2) as client,
            pytest.raises(MeterlyApiError) as caught,
        ):
            client.create_customer("user_1", "tokens")
    finally:
        server.stop()
    return caught.value


# The guard


@pytest.fixture
def customer(remote: faults, user: User) -> Customer:
    return fund(user)


#: Answers to a reserve of 25 image_credits that are not.
WRONG_HOLDS: list[Any] = [
    *({"customerId": value} for value in ("cus_other", 5, "\x00", {})),
    *({"amount": value} for value in (1, 24, "25", "-5", -25, 25.0, True, 2**63)),
    *({"unit": value} for value in ("free", "Image_credits", "", 5)),
    *({"reference": value} for value in ("another", "\ud800", 5)),
    *({"reservationId": value} for value in ("../../v1/grants", "\x00", "", 5, None)),
    {"reservationId": "x" * 900_000},
    *({"status": value} for value in ("done", "RESERVED", True, ["reserved"])),
    *({"expiresAt": value} for value in ("never", 5, "2026-01-01T00:00:00+09:00")),
    *({"balance": value} for value in ([], "x", {}, {"creditUnit": "image_credits"})),
    {"balance": {"creditUnit": "free", "available": 5}},
    {"balance": {"creditUnit": "image_credits", "available": -5}},
    {
        "balance": {
            "customerId": "cus_other",
            "creditUnit": "image_credits",
            "available": 5,
        }
    },
    *(None, [], "x", True),
]


def changed(change: Any) -> Altered:
    if isinstance(change, dict):
        return Altered(lambda body: {**body, **change})
    return Altered(lambda body: change)


def inside(change: Any) -> Altered:
    """Change a field of an object in the answer, and leave its others."""
    if not (isinstance(change, dict) and isinstance(next(iter(change.values())), dict)):
        return changed(change)
    [(name, fields_)] = change.items()
    return Altered(lambda body: {**body, name: {**body[name], **fields_}})


@pytest.mark.parametrize("change", WRONG_HOLDS, ids=lambda value: repr(value)[:50])
def test_f51_wrong_answer_to_a_reserve_runs_nothing_and_is_released_later(
    remote: faults, customer: Customer, change: Any
) -> None:
    # Wrong for the work, and wrong again for the first sweep.
    remote.meet("reserve_credits", changed(change), changed(change))
    ran = []
    with pytest.raises(MeterlyUnavailableError), guard(customer, 25, "image_credits"):
        ran.append(1)
    assert ran == []
    row = Reservation.objects.get()
    assert (row.state, row.reservation_id) == ("intent", None)
    sweep()
    row.refresh_from_db()
    assert (row.state, row.reservation_id) == ("release_pending", None)
    assert row.last_error.isprintable()
    sweep()
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    assert_books_balance()


@PROPERTY
@hypothesis.given(data=st.data())
def test_f51_whatever_a_ledger_answers_a_guard_ends_in_the_books(
    remote: faults, data: st.DataObject
) -> None:
    customer = fund(f"user-{Entry.objects.count()}")
    names = ["reservationId", "customerId", "unit", "amount", "status"]
    names += ["reference", "expiresAt", "balance"]

    def alteration() -> Altered:
        path = data.draw(st.sampled_from([(), *((name,) for name in names)]))
        value = data.draw(ANYTHING)
        # What a ledger may well say: another id of its own, and that a replayed hold
        # has ended.
        believable = (
            path == ("reservationId",)
            and isinstance(value, str)
            and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value)
        ) or (path == ("status",) and value in ("committed", "released", "expired"))
        hypothesis.assume(not believable)
        return Altered(lambda answer: altered(answer, path, value))

    line = faults(
        reserve_credits=[alteration()],
        commit_reservation=[alteration()],
        release_reservation=[alteration()],
    )
    fails = data.draw(st.booleans())
    ran = []
    try:
        with line, guard(customer, 25, "image_credits"):
            ran.append(1)
            if fails:
                raise ZeroDivisionError
    except (MeterlyUnavailableError, ZeroDivisionError):
        pass
    row = Reservation.objects.get(customer=customer)
    row.full_clean()
    sweep()
    row.refresh_from_db()
    charged = bool(ran) and not fails
    assert row.state == ("committed" if charged else "released")
    assert balance(customer) == (75 if charged else 100, 0)


@pytest.mark.parametrize("page", [False, True], ids=["problem", "page"])
def test_f51_guarded_view_answers_503_for_a_wrong_answer(
    remote: faults, customer: Customer, payer: Client, page: bool
) -> None:
    remote.meet("reserve_credits", changed({"customerId": "cus_other\n<b>"}))
    accept = "text/html" if page else "application/json"
    response = payer.post("/paid/", headers={"accept": accept})
    assert response.status_code == 503
    assert "cus_other" not in response.content.decode()
    assert movements() == ["reserved"]
    sweep()
    assert states() == ["released"]


WRONG_ENDS: list[Any] = [
    *({"status": value} for value in ("reserved", "expired", "done", "", 5, [])),
    *({"reservationId": value} for value in ("res_other", "", 5)),
    *({"balance": value} for value in ([], {}, {"creditUnit": 5, "available": 1})),
    *({"amount": value} for value in ("25", -25, 0)),
    *(None, [], "x"),
]


@pytest.mark.parametrize(
    "change", [{"status": "released"}, *WRONG_ENDS], ids=lambda value: repr(value)[:50]
)
def test_f51_wrong_answer_to_a_commit_is_settled_later(
    remote: faults, customer: Customer, payer: Client, change: Any
) -> None:
    remote.meet("commit_reservation", changed(change), changed(change))
    assert payer.post("/paid/").status_code == 200
    for _ in range(2):
        row = Reservation.objects.get()
        assert (row.state, row.charge, row.stuck_at) == ("commit_pending", 25, None)
        sweep()
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize(
    "change", [{"status": "committed"}, *WRONG_ENDS], ids=lambda value: repr(value)[:50]
)
def test_f51_wrong_answer_to_a_release_is_settled_later(
    remote: faults, customer: Customer, payer: Client, change: Any
) -> None:
    remote.meet("release_reservation", changed(change), changed(change))
    assert payer.post("/raises/", {"kind": "404"}).status_code == 404
    for _ in range(2):
        assert states() == ["release_pending"]
        sweep()
    assert states() == ["released"]
    assert movements() == ["reserved", "released"]
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"entry": {"amount": 4}},
        {"entry": {"unit": "free"}},
        {"entry": {"reference": "another"}},
        {"entry": []},
        {"balance": {"creditUnit": "free"}},
        {"balance": {"customerId": "cus_other"}},
        {"balance": {"available": True}},
        None,
    ],
    ids=repr,
)
def test_f51_wrong_answer_to_a_debit_is_settled_once(
    remote: faults, customer: Customer, change: Any
) -> None:
    remote.meet("use_credits", inside(change))
    with guard(customer, 25, "image_credits") as reservation:
        reservation.charge(30)
    assert states() == ["commit_pending"]
    sweep()
    assert states() == ["committed"]
    assert balance(customer) == (70, 0)
    assert_books_balance()


def only_needed(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out whatever the vendor's guide does not show."""
    return {name: body[name] for name in ("reservationId",) if name in body}


def test_f51_ledger_that_says_no_more_than_the_guide_serves_every_state(
    remote: faults, user: User, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LOW_BALANCE": {"image_credits": 99}}
    heard: list[Any] = []

    def hear(**facts: Any) -> None:
        heard.append(facts)

    signals.low_balance.connect(hear)
    customer = fund(user)
    silent = Altered(lambda body: {})
    with faults(
        reserve_credits=Altered(only_needed),
        commit_reservation=silent,
        release_reservation=silent,
        use_credits=silent,
        extend_reservation=silent,
    ) as line:
        with guard(customer, 5, "image_credits") as reservation:
            assert reservation.available == 0
            row = reservation.reservation
            assert row is not None
            assert journal.extend(get_client(), row, "x")
        with guard(customer, 5, "image_credits") as reservation:
            reservation.charge(7)
        with pytest.raises(ZeroDivisionError), guard(customer, 5, "image_credits"):
            raise ZeroDivisionError
        line.meet("commit_reservation", "lost")
        with guard(customer, 5, "image_credits") as reservation:
            reservation.charge(2)
        sweep()
    assert states() == ["committed", "committed", "released", "committed"]
    assert balance(customer) == (86, 0)
    assert heard == []
    signals.low_balance.disconnect(hear)


def test_f51_extension_of_a_hold_that_has_ended_is_none(
    remote: faults, customer: Customer
) -> None:
    with guard(customer, 5, "image_credits") as reservation:
        row = reservation.reservation
        assert row is not None
        remote.meet("extend_reservation", changed({"status": "expired"}))
        assert not journal.extend(get_client(), row, "1")
        # An answer that is wrong says nothing about the hold.
        remote.meet("extend_reservation", changed({"status": "gone"}))
        assert journal.extend(get_client(), row, "2")


# Customers, grants, balances


@pytest.mark.parametrize(
    "change",
    [
        {"customerId": "../../v1/grants"},
        {"customerId": "\x00"},
        {"customerId": None},
        {"customerExternalId": "user_2"},
        {"creditUnit": "free"},
        None,
    ],
    ids=repr,
)
def test_f51_wrong_answer_to_a_registration_is_not_stored(
    remote: faults, change: Any
) -> None:
    remote.meet("create_customer", changed(change))
    customer = Customer.objects.resolve("user_1")
    with pytest.raises(MeterlyUnavailableError):
        guard("user_1", 5, "image_credits").reserve()
    customer.refresh_from_db()
    assert customer.customer_id is None
    fund("user_1")
    with guard("user_1", 5, "image_credits"):
        pass
    customer.refresh_from_db()
    assert balance(customer) == (95, 0)


@pytest.mark.parametrize("value", NONSENSE, ids=shows)
def test_f57_nonsense_in_a_conflict_locks_nobody_out(
    remote: faults, value: Any
) -> None:
    if value in ("5", "free", "None", "true", "cus_other", "res_other"):
        value = f"/{value}"
    if isinstance(value, str) and value.isalpha() and value.isascii():
        value = f"{value[:64]}!"
    details = {"customerId": value}
    remote.meet("create_customer", MeterlyCustomerExistsError(details=details))
    with pytest.raises(MeterlyUnavailableError):
        guard("user_1", 5, "image_credits").reserve()
    # One that looks like an id is replaced when the ledger does not know it.
    assert Customer.objects.get().customer_id != value
    customer = fund("user_1")
    Customer.objects.update(customer_id=None)
    with guard("user_1", 5, "image_credits"):
        pass
    assert balance(customer) == (95, 0)


@pytest.mark.parametrize("durable", [True, False])
def test_f51_id_of_another_customer_is_not_stored(
    remote: faults, customer: Customer, durable: bool
) -> None:
    theirs = customer.customer_id
    for fault in (
        changed({"customerId": theirs}),
        MeterlyCustomerExistsError(details={"customerId": theirs}),
    ):
        remote.meet("create_customer", fault)
        with pytest.raises(MeterlyUnavailableError, match="another customer"):
            guard("user_2", 5, "image_credits", durable=durable).reserve()
    assert Customer.objects.get(external_id="user_2").customer_id is None
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"customerId": "cus_other"},
        {"customerId": "\x00"},
        {"customerId": None},
        {"creditAmount": 4},
        {"creditUnit": "free"},
        {"reference": "another"},
        {"grantId": "../"},
        {"createdAt": "soon"},
    ],
    ids=repr,
)
def test_f51_wrong_answer_to_a_grant_leaves_it_pending(
    remote: faults, customer: Customer, change: dict[str, Any]
) -> None:
    remote.meet("grant_credits", inside({"grant": change}))
    grant, _ = grants.grant(
        get_client(), customer, 5, "image_credits", reason="x", reference="order-1"
    )
    assert grant.state == Grant.State.PENDING
    grant.refresh_from_db()
    assert next(iter(change)) in grant.last_error or "cus_other" in grant.last_error
    assert grants.settle_due(get_client()) == 1
    grant.refresh_from_db()
    assert grant.state == Grant.State.GRANTED
    assert balance(customer) == (105, 0)


def test_f51_grant_to_a_new_customer_does_not_store_the_id_of_another(
    remote: faults, customer: Customer
) -> None:
    theirs = customer.customer_id
    other = Customer.objects.resolve("somebody-else")
    # In the balance, too: only the customer's own record shows that it is another's.
    remote.meet(
        "grant_credits",
        Altered(
            lambda body: {
                "grant": {**body["grant"], "customerId": theirs},
                "balance": {**body["balance"], "customerId": theirs},
            }
        ),
    )
    grant, _ = grants.grant(
        get_client(), other, 5, "image_credits", reason="x", reference="order-1"
    )
    assert (grant.state, other.customer_id) == (Grant.State.PENDING, None)
    grants.settle_due(get_client())
    other.refresh_from_db()
    assert balance(other) == (5, 0)


def test_f51_balances_of_somebody_else_are_not_shown(
    remote: faults, customer: Customer, admin_client: Client
) -> None:
    url = f"/admin/meterly/customer/{customer.pk}/change/"
    for change in (
        {"customerId": "cus_other"},
        {"balances": [{"creditUnit": "image_credits", "available": "<b>4711</b>\x00"}]},
        {"balances": nested(50_000)},
    ):
        remote.meet("get_balances", changed(change))
        page = admin_client.get(url).content.decode()
        assert "The ledger does not tell the balances right now." in page
        assert "<b>" not in page
    remote.meet(
        "get_balances",
        changed({"balances": [{"creditUnit": "image_credits", "available": 4711}]}),
    )
    page = admin_client.get(url).content.decode()
    assert "<td>4711</td>" in page
    assert "None" not in page


# Refusals


NONSENSE_DETAILS: list[Any] = [
    dict.fromkeys(("required", "available", "reserved", "unit"), value)
    for value in NONSENSE
]


@pytest.mark.parametrize("accept", ["text/html", "application/json"])
def test_f57_402_shows_what_was_asked_for_whatever_the_ledger_says(
    remote: faults, customer: Customer, payer: Client, accept: str
) -> None:
    for details in NONSENSE_DETAILS:
        remote.meet(
            "reserve_credits",
            api_error(402, "insufficient_credits", "\x00\n<b>", details=details),
        )
        response = payer.post("/paid/", headers={"accept": accept})
        assert response.status_code == 402
        text = unescape(response.content.decode())
        assert len(text) < 10_000
        if accept == "application/json":
            problem = json.loads(text)
            assert (problem["required"], problem["unit"]) == (25, "image_credits")
            assert 0 <= problem["available"] < 25
        else:
            assert "25 image_credits" in text
        assert "\x00" not in text
    assert set(states()) == {"denied"}
    assert movements() == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 422, 429, 500, 503])
def test_f57_error_of_nonsense_is_stored_and_shown_cleaned(
    remote: faults,
    customer: Customer,
    payer: Client,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    said = "\x00\n\x1b[2J\ud800\u202e" + "x" * 900_000
    error = api_error(
        status,
        said,
        said,
        request_id=said,
        details={"retryAfter": said, "required": [], "fields": said, said: said},
    )
    client = payer
    client.raise_request_exception = False
    remote.meet("reserve_credits", error)
    response = client.post("/paid/")
    assert response.status_code in (422, 500, 503)
    assert "x" * 3000 not in response.content.decode()
    # And for a row that is to be settled.
    remote.meet("commit_reservation", error)
    assert client.post("/paid/").status_code == 200
    for row in Reservation.objects.all():
        assert row.last_error.isprintable()
        assert len(row.last_error) < 3000
    for record in caplog.records:
        if record.name.startswith("django_meterly"):
            assert record.getMessage().isprintable()
            assert len(record.getMessage()) < 5000
    lapse_leases()
    sweep()
    lapse_leases()
    sweep()
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("value", [-5, "soon", 10**30, 1e999, [], None, True], ids=repr)
def test_f57_nonsense_retry_after_is_no_time_to_wait(value: Any) -> None:
    body = json.dumps(
        {"error": {"code": "rate_limited", "message": "no", "retryAfter": value}}
    ).replace("Infinity", "1e999")
    started = time.monotonic()
    error = over_http(answer(body.encode(), "429 Too Many Requests"))
    assert isinstance(error, MeterlyRateLimitedError)
    assert error.details == {}
    assert time.monotonic() - started < 2


def test_f57_error_of_a_transport_that_is_none_of_ours_is_stored_cleaned(
    remote: faults, customer: Customer
) -> None:
    remote.meet("commit_reservation", "lost", ValueError("\x00\n" + "x" * 900_000))
    with guard(customer, 25, "image_credits"):
        pass
    sweep()
    row = Reservation.objects.get()
    assert row.state == "commit_pending"
    assert row.last_error.isprintable()
    assert len(row.last_error) < 3000
    sweep()
    assert states() == ["committed"]


def test_f67_page_of_a_proxy_forgets_no_customer(
    settings: Any, customer: Customer, payer: Client
) -> None:
    page = answer(b"<h1>Not here</h1>", "404 Not Found")
    server = Server(lambda connection: connection.sendall(page))
    try:
        settings.METERLY = {
            "API_KEY": KEY,
            "BASE_URL": server.url,
            "DEFAULT_UNIT": "image_credits",
            "MAX_ATTEMPTS": 1,
        }
        assert payer.post("/paid/").status_code == 503
        get_client().close()
    finally:
        server.stop()
    known = customer.customer_id
    customer.refresh_from_db()
    assert customer.customer_id == known
