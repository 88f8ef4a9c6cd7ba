from __future__ import annotations

import asyncio
import inspect
import pickle
import subprocess
import sys
import threading
import time
from decimal import Decimal
from typing import Any

import pytest

from django_meterly.client import MeterlyClient
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyRateLimitedError,
    MeterlyReservationExpiredError,
    MeterlyServerError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from django_meterly.transports import Call, Transport
from django_meterly.types import EntryPage

#: What a commit and a release come to; every other call leaves the hold alone.
STATUSES = {"commit_reservation": "committed", "release_reservation": "released"}


class Recorder(Transport):
    """Answers with reservations, or with what *answers* has for an operation.

    A callable among the answers is called for one.
    """

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[Call] = []
        self.closed = False

    def send(self, call: Call) -> dict[str, Any]:
        self.calls.append(call)
        answer = self.answers.get(call.operation, {})
        if callable(answer):
            answer = answer()
        if isinstance(answer, BaseException):
            raise answer
        return {
            "reservationId": "res_1",
            "customerId": "cus_1",
            "unit": "tokens",
            "amount": 5,
            "status": STATUSES.get(call.operation, "reserved"),
            "reference": call.arguments.get("reference", "job"),
            "expiresAt": "2026-01-01T00:00:00Z",
            "balance": {
                "creditUnit": "tokens",
                "balance": 10,
                "reserved": 5,
                "available": 5,
            },
            **answer,
        }

    def close(self) -> None:
        self.closed = True

    @property
    def operations(self) -> list[str]:
        return [call.operation for call in self.calls]


@pytest.fixture
def transport() -> Recorder:
    return Recorder()


@pytest.fixture
def meterly(transport) -> MeterlyClient:
    return MeterlyClient(transport=transport)


# What is refused before anything is sent

BAD_AMOUNTS = [
    True,
    False,
    1.5,
    1.0,
    "10",
    Decimal(10),
    float("nan"),
    float("inf"),
    None,
    -1,
    2**63,
]
BAD_TEXTS = ["", " a", "a ", "a\n", "a\tb", "\x00", "é", "x" * 256, 5, b"a"]
BAD_KEYS = ["", "a b", " a", "a\n", "\x7f", "é", "x" * 256, 5, b"a"]
BAD_UNITS = ["", "a b", "_a", "é", "x" * 65, 5, "a\n"]
BAD_IDS = ["", "a/b", "..", "a b", "a\n", "é", "x" * 65, 5, None]


@pytest.mark.parametrize("amount", [*BAD_AMOUNTS, 0], ids=repr)
@pytest.mark.parametrize(
    "method", ["add_credits", "use_credits", "reserve_credits", "guard"]
)
def test_f11_bad_amount_is_refused_before_anything_is_sent(
    meterly, transport, method, amount
):
    with pytest.raises(MeterlyInvalidRequestError, match="amount must be"):
        _enter(getattr(meterly, method)("cus_1", amount))
    with pytest.raises(MeterlyInvalidRequestError, match="amount must be"):
        meterly.grant_credits("user_1", amount, "tokens", "r")
    assert transport.calls == []


@pytest.mark.parametrize("amount", [a for a in BAD_AMOUNTS if a is not None], ids=repr)
def test_f11_bad_commit_amount_is_refused(meterly, transport, amount):
    with pytest.raises(MeterlyInvalidRequestError, match="amount must be"):
        meterly.commit_reservation("res_1", amount=amount)
    assert transport.calls == []


def test_commit_of_zero_is_sent_and_of_nothing_leaves_it_out(meterly, transport):
    meterly.commit_reservation("res_1", amount=0)
    meterly.commit_reservation("res_1")
    assert [call.payload for call in transport.calls] == [{"amount": 0}, {}]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=repr)
def test_f11_bad_reference_or_external_id_is_refused(meterly, transport, text):
    for call in (
        lambda: meterly.grant_credits("user_1", 1, "tokens", text),
        lambda: meterly.add_credits("cus_1", 1, reference=text),
        lambda: meterly.use_credits("cus_1", 1, reference=text),
        lambda: meterly.reserve_credits("cus_1", 1, reference=text),
        lambda: _enter(meterly.guard("cus_1", 1, reference=text)),
        lambda: meterly.grant_credits(text, 1, "tokens", "r"),
        lambda: meterly.create_customer(text, "tokens"),
        lambda: meterly.find_customer(text),
    ):
        with pytest.raises(
            MeterlyInvalidRequestError, match=r"(reference|external\w*_id) must be"
        ):
            call()
    assert transport.calls == []


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_f11_bad_idempotency_key_is_refused(meterly, transport, key):
    for call in (
        lambda: meterly.create_customer("user_1", "tokens", idempotency_key=key),
        lambda: meterly.use_credits("cus_1", 1, idempotency_key=key),
        lambda: meterly.reserve_credits("cus_1", 1, idempotency_key=key),
        lambda: meterly.commit_reservation("res_1", idempotency_key=key),
        lambda: meterly.extend_reservation("res_1", 60, idempotency_key=key),
        lambda: meterly.release_reservation("res_1", idempotency_key=key),
    ):
        with pytest.raises(MeterlyInvalidRequestError, match="idempotency_key must be"):
            call()
    assert transport.calls == []


@pytest.mark.parametrize("unit", BAD_UNITS, ids=repr)
def test_f11_bad_unit_is_refused(meterly, transport, unit):
    for call in (
        lambda: meterly.create_customer("user_1", unit),
        lambda: meterly.use_credits("cus_1", 1, unit),
        lambda: meterly.list_entries("cus_1", unit),
        lambda: meterly.reserve_credits("cus_1", 1, unit=unit),
    ):
        with pytest.raises(MeterlyInvalidRequestError, match="unit must be"):
            call()
    assert transport.calls == []


@pytest.mark.parametrize("value", BAD_IDS, ids=repr)
def test_id_that_would_change_the_path_is_refused(meterly, transport, value):
    for call in (
        lambda: meterly.get_balance(value),
        lambda: meterly.list_entries(value),
        lambda: meterly.extend_reservation(value, 60),
        lambda: meterly.use_credits(value, 1),
        lambda: meterly.get_reservation(value),
        lambda: meterly.commit_reservation(value),
    ):
        with pytest.raises(MeterlyInvalidRequestError, match="_id must be"):
            call()
    assert transport.calls == []


@pytest.mark.parametrize("ttl", [0, -1, 86401, 1.5, True, "60"], ids=repr)
def test_bad_ttl_is_refused(meterly, transport, ttl):
    with pytest.raises(MeterlyInvalidRequestError, match="ttl_seconds must be"):
        meterly.reserve_credits("cus_1", 1, ttl_seconds=ttl)
    with pytest.raises(MeterlyInvalidRequestError, match="ttl_seconds must be"):
        meterly.extend_reservation("res_1", ttl)
    assert transport.calls == []


# What is sent, and how answers are read


def test_call_has_the_names_of_the_wire(meterly, transport):
    meterly.reserve_credits(
        "cus_1",
        5,
        unit="tokens",
        reference="job",
        idempotency_key="key",
        ttl_seconds=60,
    )
    assert transport.calls == [
        Call(
            "reserve_credits",
            {
                "customerId": "cus_1",
                "amount": 5,
                "reference": "job",
                "unit": "tokens",
                "ttlSeconds": 60,
            },
            "key",
        )
    ]


def test_extend_sets_the_time_to_live(meterly, transport):
    extended = meterly.extend_reservation("res_1", 60, idempotency_key="key")
    assert extended.reservation_id == "res_1"
    assert transport.calls == [
        Call("extend_reservation", {"reservationId": "res_1", "ttlSeconds": 60}, "key")
    ]
    assert transport.calls[0].path == "/v1/reservations/res_1/extend"
    assert transport.calls[0].payload == {"ttlSeconds": 60}


ENTRY = {
    "entryId": "ent_1",
    "kind": "credits_used",
    "amount": 3,
    "balanceDelta": -3,
    "reservedDelta": 0,
    "balanceAfter": 7,
    "reservedAfter": 0,
    "unit": "tokens",
    "reference": "job",
    "createdAt": "2026-01-01T00:00:00Z",
}


def test_entries_come_in_pages(meterly, transport):
    transport.answers["list_entries"] = {"entries": [ENTRY], "nextCursor": "ent_1"}
    page = meterly.list_entries("cus_1", "tokens", cursor="ent_9")
    assert [entry.balance_delta for entry in page.entries] == [-3]
    assert page.next_cursor == "ent_1"
    assert transport.calls[0].payload == {"unit": "tokens", "cursor": "ent_9"}

    transport.answers["list_entries"] = {"entries": [], "nextCursor": None}
    assert meterly.list_entries("cus_1") == EntryPage((), None)
    assert transport.calls[1].payload == {}


def test_calls_within_some_seconds_share_them(meterly, transport):
    limited = meterly.within(5, attempts=1)
    transport.answers["reserve_credits"] = lambda: time.sleep(0.1) or {}
    limited.reserve_credits("cus_1", 5)
    limited.release_reservation("res_1")
    limited.within(60).release_reservation("res_1")
    meterly.release_reservation("res_1")

    first, second, third, other = transport.calls
    assert first.timeout == pytest.approx(5, abs=0.1)
    assert second.timeout == pytest.approx(4.9, abs=0.09)
    assert third.timeout <= second.timeout
    assert {call.attempts for call in (first, second, third)} == {1}
    assert (other.timeout, other.attempts) == (None, None)


def test_no_time_left_is_no_time_and_not_less(meterly, transport):
    meterly.within(-1).release_reservation("res_1")
    assert transport.calls[0].timeout == 0


def test_omitted_key_and_reference_are_new_for_every_call(meterly, transport):
    for _ in range(2):
        meterly.reserve_credits("cus_1", 5)
    first, second = transport.calls
    assert first.idempotency_key != second.idempotency_key
    assert first.arguments["reference"] != second.arguments["reference"]


@pytest.mark.parametrize(
    "answer", [{"amount": 5, "expiresAt": "soon"}, {"balance": []}, {"balance": {}}]
)
def test_answer_of_another_shape_is_unknown_and_names_the_key(answer):
    meterly = MeterlyClient(transport=Recorder(reserve_credits=answer))
    with pytest.raises(MeterlyUnknownOutcomeError, match="invalid") as caught:
        meterly.reserve_credits("cus_1", 5, idempotency_key="key")
    assert caught.value.idempotency_key == "key"


def test_unknown_outcome_names_the_key(meterly, transport):
    transport.answers["use_credits"] = MeterlyServerError()
    with pytest.raises(MeterlyServerError) as caught:
        meterly.use_credits("cus_1", 5, idempotency_key="key")
    assert caught.value.idempotency_key == "key"


def test_key_and_transport_together_are_refused(transport):
    with pytest.raises(TypeError, match="not both"):
        MeterlyClient("mk_test_x", transport=transport)


def test_client_is_a_context_manager_that_closes(transport):
    with MeterlyClient(transport=transport):
        assert not transport.closed
    assert transport.closed


# A ledger that can only commit a hold as a whole


MOVED = {
    "balance": {
        "creditUnit": "tokens",
        "balance": 9,
        "reserved": 0,
        "available": 9,
    },
}


@pytest.fixture
def whole(transport) -> Recorder:
    transport.partial_commit = False
    transport.answers["commit_reservation"] = {"status": "committed"}
    transport.answers["add_credits"] = MOVED
    return transport


@pytest.mark.parametrize("amount", [0, 1, 4])
def test_commit_of_less_adds_the_rest_again(meterly, whole, amount):
    settled = meterly.commit_reservation("res_1", amount=amount, idempotency_key="key")

    assert whole.operations == ["get_reservation", "commit_reservation", "add_credits"]
    _, commit, refund = whole.calls
    assert (commit.payload, commit.idempotency_key) == ({}, "key")
    assert refund.arguments == {
        "customerId": "cus_1",
        "amount": 5 - amount,
        "unit": "tokens",
        "reference": "refund:res_1",
    }
    assert refund.idempotency_key == "refund:res_1"
    assert (settled.status, settled.balance.balance) == ("committed", 9)


@pytest.mark.parametrize("amount", [None, 5])
def test_commit_of_all_adds_nothing(meterly, whole, amount):
    meterly.commit_reservation("res_1", amount=amount)
    assert "add_credits" not in whole.operations


def test_commit_of_more_than_the_hold_charges_nothing(meterly, whole):
    with pytest.raises(MeterlyInvalidRequestError, match="at most the 5"):
        meterly.commit_reservation("res_1", amount=6)
    assert whole.operations == ["get_reservation"]


@pytest.mark.parametrize(
    "failure",
    [MeterlyNotSentError(), MeterlyRateLimitedError(), MeterlyServerError()],
    ids=repr,
)
def test_f02_commit_whose_refund_may_be_missing_is_unknown(meterly, whole, failure):
    whole.answers["add_credits"] = failure
    with pytest.raises(MeterlyUnknownOutcomeError, match="committed") as caught:
        meterly.commit_reservation("res_1", amount=2, idempotency_key="key")
    assert caught.value.__cause__ is failure
    assert caught.value.idempotency_key == "key"
    # The same call again finishes the pair: every key is the same.
    whole.answers["add_credits"] = MOVED
    meterly.commit_reservation("res_1", amount=2, idempotency_key="key")
    assert whole.calls[:3] == whole.calls[3:]


def test_refused_commit_adds_nothing(meterly, whole):
    whole.answers["commit_reservation"] = MeterlyReservationExpiredError()
    with pytest.raises(MeterlyReservationExpiredError):
        meterly.commit_reservation("res_1", amount=2)
    assert whole.operations == ["get_reservation", "commit_reservation"]


# guard


def _enter(held: Any) -> None:
    with held:
        pass


def test_guard_reserves_runs_then_commits(meterly, transport):
    with meterly.guard("cus_1", 5, "tokens", "job", "key", 60) as reservation:
        assert reservation.reservation_id == "res_1"
        assert transport.operations == ["reserve_credits"]
    assert transport.operations == ["reserve_credits", "commit_reservation"]
    assert [call.idempotency_key for call in transport.calls] == ["key", "key:commit"]


@pytest.mark.parametrize("key", [*BAD_KEYS, "x" * 201], ids=repr)
def test_f11_guard_refuses_a_key_that_leaves_no_room_for_the_derived_ones(
    meterly, transport, key
):
    with pytest.raises(MeterlyInvalidRequestError, match="idempotency_key must be"):
        meterly.guard("cus_1", 5, idempotency_key=key, callback=lambda: None)
    assert transport.calls == []


def test_guard_takes_a_key_of_the_greatest_length(meterly, transport):
    _enter(meterly.guard("cus_1", 5, idempotency_key="x" * 200))
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_guard_with_callback_returns_its_result(meterly, transport):
    assert meterly.guard("cus_1", 5, callback=lambda: "done") == "done"
    assert transport.operations == ["reserve_credits", "commit_reservation"]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize(
    "release", [{}, MeterlyNotSentError(), MeterlyUnknownOutcomeError()], ids=repr
)
def test_f23_work_that_raises_is_released_and_the_same_object_raised(
    meterly, transport, error, release
):
    transport.answers["release_reservation"] = release

    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        meterly.guard("cus_1", 5, idempotency_key="key", callback=work)
    assert caught.value is error
    assert transport.operations == ["reserve_credits", "release_reservation"]
    assert transport.calls[1].idempotency_key == "key:release"


@pytest.mark.parametrize(
    "refusal",
    [
        MeterlyInsufficientCreditsError(),
        MeterlyNotSentError(),
        MeterlyUnknownOutcomeError(),
        MeterlyServerError(),
    ],
    ids=repr,
)
def test_f01_nothing_runs_without_a_hold(meterly, transport, refusal):
    transport.answers["reserve_credits"] = refusal
    ran = []
    with pytest.raises(MeterlyError) as caught:
        meterly.guard("cus_1", 5, callback=lambda: ran.append(1))
    assert caught.value is refusal
    assert (ran, transport.operations) == ([], ["reserve_credits"])


@pytest.mark.parametrize("key", [None, "key"])
def test_nothing_runs_on_a_hold_that_was_committed(meterly, transport, key):
    transport.answers["reserve_credits"] = {"status": "committed", "replayed": True}
    ran = []
    with pytest.raises(MeterlyDuplicateError, match="was used already") as caught:
        meterly.guard("cus_1", 5, None, "job", key, callback=lambda: ran.append(1))
    assert (caught.value.state, caught.value.in_progress) == ("committed", False)
    assert caught.value.reference == "job"
    assert (ran, transport.operations) == ([], ["reserve_credits"])


@pytest.mark.parametrize("status", ["released", "expired"])
def test_guard_of_a_dead_hold_makes_a_new_attempt(meterly, transport, status):
    dead = [{"status": status, "replayed": True}] * 2
    transport.answers["reserve_credits"] = lambda: dead.pop() if dead else {}
    assert meterly.guard("cus_1", 5, None, "job", "key", callback=lambda: 7) == 7
    assert [call.idempotency_key for call in transport.calls] == [
        "key",
        "key~2",
        "key~3",
        "key~3:commit",
    ]
    assert {call.arguments.get("reference") for call in transport.calls} == {
        "job",
        None,
    }


def test_guard_that_fails_again_releases_its_own_attempt(meterly, transport):
    dead = [{"status": "released", "replayed": True}]
    transport.answers["reserve_credits"] = lambda: dead.pop() if dead else {}
    with pytest.raises(ZeroDivisionError):
        meterly.guard("cus_1", 5, idempotency_key="key", callback=lambda: 1 / 0)
    assert [call.idempotency_key for call in transport.calls] == [
        "key",
        "key~2",
        "key~2:release",
    ]


def test_key_of_which_nothing_ever_comes_is_given_up(meterly, transport):
    transport.answers["reserve_credits"] = {"status": "released", "replayed": True}
    with pytest.raises(MeterlyUsageError, match=r"tried 100 times.* Use a new key\."):
        _enter(meterly.guard("cus_1", 5, idempotency_key="key"))
    assert transport.operations == ["reserve_credits"] * 100


def test_live_hold_of_a_named_key_is_in_progress(meterly, transport):
    transport.answers["reserve_credits"] = {"replayed": True}
    with pytest.raises(MeterlyDuplicateError, match="is in use right now") as caught:
        _enter(meterly.guard("cus_1", 5, idempotency_key="key"))
    assert (caught.value.state, caught.value.in_progress) == ("reserved", True)
    # Whoever holds it goes on.
    assert transport.operations == ["reserve_credits"]


def test_live_hold_of_a_random_key_is_its_own(meterly, transport):
    # The transport has asked twice, for the first answer was lost.
    transport.answers["reserve_credits"] = {"replayed": True}
    _enter(meterly.guard("cus_1", 5))
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_guard_is_for_one_piece_of_work(meterly, transport):
    held = meterly.guard("cus_1", 5)
    _enter(held)
    with pytest.raises(MeterlyUsageError, match="one piece of work"):
        _enter(held)
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_without_a_reference_the_same_key_is_the_same_request(meterly, transport):
    for _ in range(2):
        meterly.reserve_credits("cus_1", 5, idempotency_key="k")
        meterly.use_credits("cus_1", 5, idempotency_key="k")
        meterly.add_credits("cus_1", 5, idempotency_key="k")
        _enter(meterly.guard("cus_1", 5, idempotency_key="k"))
    half = len(transport.calls) // 2
    assert transport.calls[:half] == transport.calls[half:]
    assert {call.arguments.get("reference", "k") for call in transport.calls} == {"k"}


def test_f11_what_the_client_refuses_is_an_error_of_the_api(meterly, transport):
    with pytest.raises(MeterlyInvalidRequestError) as caught:
        meterly.use_credits("cus_1", 0)
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.status, error.code) == (400, "invalid_request")
    assert error.request_id is None
    assert str(error).startswith("400 invalid_request: amount must be")
    assert pickle.loads(pickle.dumps(error)).args == error.args
    assert transport.calls == []


@pytest.mark.parametrize(
    "failure",
    [
        MeterlyUnknownOutcomeError("lost"),
        MeterlyServerError(),
        MeterlyNotSentError("refused"),
        MeterlyRateLimitedError(),
    ],
    ids=repr,
)
def test_f03_unknown_commit_releases_nothing_and_carries_result_and_key(
    meterly, transport, failure
):
    transport.answers["commit_reservation"] = failure
    with pytest.raises(MeterlyUnknownOutcomeError, match="whether it was") as caught:
        meterly.guard("cus_1", 5, idempotency_key="key", callback=lambda: "done")
    assert caught.value.result == "done"
    assert caught.value.idempotency_key == "key:commit"
    assert caught.value.__cause__ is failure
    assert transport.operations == ["reserve_credits", "commit_reservation"]


@pytest.mark.parametrize(
    "refusal", [MeterlyReservationExpiredError(), MeterlyNotFoundError()], ids=repr
)
def test_refused_commit_is_raised_and_releases_nothing(meterly, transport, refusal):
    transport.answers["commit_reservation"] = refusal
    with pytest.raises(MeterlyApiError) as caught:
        meterly.guard("cus_1", 5, callback=lambda: "done")
    assert caught.value is refusal
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_unknown_outcome_of_the_work_itself_is_a_failure_of_the_work(
    meterly, transport
):
    lost = MeterlyUnknownOutcomeError("another ledger's")

    def work() -> None:
        raise lost

    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        meterly.guard("cus_1", 5, callback=work)
    assert caught.value is lost
    assert lost.result is None
    assert transport.operations == ["reserve_credits", "release_reservation"]


# The twins for async code

#: Nothing waits in them.
NO_TWIN = {"within", "carrying"}


def test_every_method_has_a_twin_with_the_same_signature():
    methods = {
        name: member
        for name, member in vars(MeterlyClient).items()
        if callable(member) and not name.startswith("_")
    }
    twins = {name for name in methods if f"{name[1:]}" in methods and name[0] == "a"}
    plain = set(methods) - twins - NO_TWIN
    assert {f"a{name}" for name in plain} == twins
    for name in plain - {"guard"}:
        twin = methods[f"a{name}"]
        assert inspect.signature(twin) == inspect.signature(methods[name]), name
        assert inspect.iscoroutinefunction(twin)
        assert twin.__name__ == f"a{name}"
        assert twin.__doc__
    guard, aguard = (inspect.signature(methods[name]) for name in ("guard", "aguard"))
    assert list(guard.parameters) == list(aguard.parameters)
    for name in set(guard.parameters) - {"callback"}:
        assert guard.parameters[name] == aguard.parameters[name]


def test_twin_does_the_same_without_blocking_the_loop(meterly, transport):
    started = threading.Barrier(3, timeout=60)
    transport.answers["reserve_credits"] = lambda: started.wait() * 0 or {}

    async def work() -> list[Any]:
        calls = (meterly.areserve_credits("cus_1", 5, reference="job") for _ in "abc")
        return await asyncio.gather(*calls)

    assert asyncio.run(work()) == [meterly.get_reservation("res_1")] * 3
    assert [call.arguments["reference"] for call in transport.calls[:3]] == ["job"] * 3


def test_twin_raises_the_same(meterly, transport):
    transport.answers["use_credits"] = error = MeterlyInsufficientCreditsError()
    with pytest.raises(MeterlyInsufficientCreditsError) as caught:
        asyncio.run(meterly.ause_credits("cus_1", 5))
    assert caught.value is error


def test_client_is_an_async_context_manager_that_closes(transport):
    async def work() -> None:
        async with MeterlyClient(transport=transport):
            assert not transport.closed

    asyncio.run(work())
    assert transport.closed


def test_aguard_reserves_awaits_then_commits(meterly, transport):
    async def work() -> str:
        async with meterly.aguard("cus_1", 5, "tokens", "job", "key", 60) as held:
            await asyncio.sleep(0)
            assert transport.operations == ["reserve_credits"]
            return held.reservation_id

    assert asyncio.run(work()) == "res_1"
    assert transport.operations == ["reserve_credits", "commit_reservation"]
    assert [call.idempotency_key for call in transport.calls] == ["key", "key:commit"]


def test_aguard_awaits_a_callback(meterly, transport):
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    async def guarded() -> str:
        return await meterly.aguard("cus_1", 5, callback=work)

    assert asyncio.run(guarded()) == "done"
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_f23_aguard_releases_work_that_raises(meterly, transport):
    error = RuntimeError()

    async def work() -> None:
        raise error

    async def guarded() -> None:
        await meterly.aguard("cus_1", 5, callback=work)

    with pytest.raises(RuntimeError) as caught:
        asyncio.run(guarded())
    assert caught.value is error
    assert transport.operations == ["reserve_credits", "release_reservation"]


def test_f03_aguard_whose_commit_is_unknown_carries_result_and_key(meterly, transport):
    transport.answers["commit_reservation"] = MeterlyUnknownOutcomeError("lost")

    async def work() -> str:
        return "done"

    async def guarded() -> None:
        await meterly.aguard("cus_1", 5, idempotency_key="key", callback=work)

    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        asyncio.run(guarded())
    assert (caught.value.result, caught.value.idempotency_key) == ("done", "key:commit")
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def _cancelled(meterly: MeterlyClient, transport: Recorder, during: str) -> None:
    """Cancel a guarded task twice while the call *during* is under way."""
    arrived, go_on = threading.Event(), threading.Event()
    original = transport.answers.get(during, {})

    def slowly() -> Any:
        arrived.set()
        assert go_on.wait(60)
        return original

    transport.answers[during] = slowly

    async def guarded() -> None:
        async with meterly.aguard("cus_1", 5):
            pass

    async def cancel() -> None:
        task = asyncio.ensure_future(guarded())
        await asyncio.to_thread(arrived.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(cancel())


@pytest.mark.parametrize("answer", [{}, MeterlyNotSentError(), MeterlyServerError()])
def test_f22_aguard_cancelled_in_its_commit_is_committed(meterly, transport, answer):
    transport.answers["commit_reservation"] = answer
    _cancelled(meterly, transport, "commit_reservation")
    assert transport.operations == ["reserve_credits", "commit_reservation"]


def test_f22_aguard_cancelled_in_its_reserve_is_released(meterly, transport):
    _cancelled(meterly, transport, "reserve_credits")
    assert transport.operations == ["reserve_credits", "release_reservation"]


def test_f22_aguard_cancelled_in_a_reserve_that_is_refused(meterly, transport):
    transport.answers["reserve_credits"] = MeterlyInsufficientCreditsError()
    _cancelled(meterly, transport, "reserve_credits")
    assert transport.operations == ["reserve_credits"]


def test_f22_aguard_cancelled_in_its_work_is_released(meterly, transport):
    async def guarded() -> None:
        async with meterly.aguard("cus_1", 5):
            await asyncio.sleep(60)

    async def cancel() -> None:
        task = asyncio.ensure_future(guarded())
        while not transport.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert transport.operations == ["reserve_credits", "release_reservation"]


# Imports


def test_import_needs_no_settings_and_pulls_in_no_requests():
    code = (
        "import sys, django_meterly.client, django_meterly.transports\n"
        "from django.conf import settings\n"
        "assert not settings.configured\n"
        "assert not {'requests', 'rest_framework', 'celery'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
