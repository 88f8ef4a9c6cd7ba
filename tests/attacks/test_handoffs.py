"""Which messages a worker believes when they say that work was handed off to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, _state
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.signals import task_revoked
from django.core import signing
from django.core.management import call_command

from django_meterly import MeterlyUsageError, guard, handoffs
from django_meterly.models import Reservation
from django_meterly.tasks import release_handed_off
from tests import jobs
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_meterly.models import Customer

pytestmark = pytest.mark.django_db(transaction=True)
HEADER = "meterly_reservation"
# Shared tasks stay with every app that there ever was: one for all tests.
APP = Celery("tests-of-handoffs", broker="memory://", set_as_current=False)


@pytest.fixture
def customer(joined: None) -> Customer:
    return fund("user_1")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The messages that are sent, in place of a broker."""
    before = _state.get_current_app()
    found: list[dict[str, Any]] = []

    def send_task(name: str, args: Any, kwargs: Any, **options: Any) -> None:
        found.append({"name": name, "args": args, "kwargs": kwargs, **options})

    monkeypatch.setattr(APP, "send_task", send_task)
    APP.set_current()
    yield found
    before.set_current()


@pytest.fixture
def message(customer: Customer, sent: list[Any]) -> dict[str, Any]:
    """The message of work that was handed off to ``jobs.handed_off``."""
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off)
    return sent[0]  # type: ignore[no-any-return]


def deliver(task: Any, args: Any, task_id: str, headers: dict[str, Any]) -> Any:
    """Run *task* as a worker does that gets a message with these *headers*."""
    request = {"id": task_id, "task": task.name, **headers}
    tracer = build_tracer(task.name, task, app=APP)
    return tracer(task_id, args, {}, request)


def released(customer: Customer) -> str:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    work.lifecycle.fail()
    return str(work.reservation.pk)


def offered_to_another(customer: Customer) -> str:
    with guard(customer, 5) as work:
        work.hand_off(jobs.handed_off)
    return str(work.reservation.pk)


def signed_with(key: str, value: Any, salt: str = handoffs.SALT) -> str:
    return signing.Signer(key=key, salt=salt).sign_object(value)


#: What a forger may put into the header, knowing all but the key. Functions of the
#: row's id, the task's name and id, the key, and the header that was sent.
FORGED: dict[str, Any] = {
    "uncharged": lambda **_: "uncharged",
    "its id": lambda row, **_: row,
    "another's id": lambda customer, **_: offered_to_another(customer),
    "a released id": lambda customer, **_: released(customer),
    "signed by another key": lambda row, name, task_id, **_: signed_with(
        "another", [row, name, task_id]
    ),
    "uncharged by another key": lambda name, task_id, **_: signed_with(
        "another", ["uncharged", name, task_id]
    ),
    # Whatever else a project signs, somebody may have been given.
    "another salt": lambda row, name, task_id, key, **_: signed_with(
        key, [row, name, task_id], "sessions"
    ),
    "dumped": lambda row, name, task_id, **_: signing.dumps([row, name, task_id]),
    "another task's name": lambda row, task_id, **_: handoffs.sign(
        row, "jobs.plain_", task_id
    ),
    "another task's id": lambda row, name, **_: handoffs.sign(row, name, "other"),
    "uncharged for another": lambda name, **_: handoffs.sign("uncharged", name, "x"),
    "another shape": lambda key, row, **_: signed_with(key, [row]),
    "a dict": lambda key, row, **_: signed_with(key, {"0": row}),
    "a text": lambda key, row, **_: signed_with(key, row),
    "longer": lambda key, row, name, task_id, **_: signed_with(
        key, [row, name, task_id, ""]
    ),
    "empty": lambda **_: "",
    "none": lambda **_: None,
    "a number": lambda **_: 1,
    "zero": lambda **_: 0,
    "false": lambda **_: False,
    "bytes": lambda header, **_: header.encode(),
    "a list": lambda header, **_: [header],
    "a mapping": lambda header, **_: {"id": header},
    "no separator": lambda header, **_: header.replace(":", ""),
    "only separators": lambda **_: ":::",
    "not ASCII": lambda header, **_: f"é{header}",
    "no UTF-8": lambda header, **_: f"\ud800{header}",
    "no UTF-8 in the signature": lambda header, **_: f"{header}\ud800",
    "blank": lambda header, **_: f"{header} ",
    "very long": lambda **_: "a" * 1_000_000 + ":b",
}


@pytest.mark.parametrize("task", [jobs.handed_off, jobs.plain], ids=lambda t: t.name)
@pytest.mark.parametrize("how", FORGED)
def test_f58_a_forged_header_runs_nothing(
    how: str,
    task: Any,
    customer: Customer,
    sent: list[Any],
    settings: Any,
    tmp_path: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with guard("user_1", 25) as work:
        work.hand_off(task, *(["user_1"] if task is jobs.plain else []))
    [real] = sent
    forged = FORGED[how](
        row=str(work.reservation.pk),
        name=task.name,
        task_id=real["task_id"],
        key=settings.SECRET_KEY,
        header=real["headers"][HEADER],
        customer=customer,
    )
    before = (states(), balance(customer))
    args = ("user_1", 3) if task is jobs.plain else (str(tmp_path),)
    for headers in ({HEADER: forged}, {"headers": {HEADER: forged}}):
        result = deliver(task, args, real["task_id"], headers)
        assert result.info.state == "FAILURE"
        assert "SECRET_KEY" in str(result.info.retval)
        assert (states(), balance(customer)) == before
        assert not (tmp_path / "notes").exists()
        assert "is refused" in caplog.text
        caplog.clear()
    with pytest.raises(MeterlyUsageError):
        release_handed_off(forged, task.name, real["task_id"])
    assert (states(), balance(customer)) == before

    # The message itself is as good as ever.
    assert deliver(task, args, real["task_id"], real["headers"]).info is None
    assert Reservation.objects.get(pk=work.reservation.pk).state == "committed"
    call_command("meterly_ledger_verify", verbosity=0)


def test_f58_no_part_of_the_header_is_a_header(message: dict[str, Any]) -> None:
    name, task_id = message["name"], message["task_id"]
    header = message["headers"][HEADER]
    assert handoffs.read(header, name, task_id)
    for place in range(len(header)):
        other = "A" if header[place] != "A" else "B"
        for forged in (
            header[:place],
            header[place + 1 :],
            header[:place] + other + header[place + 1 :],
        ):
            with pytest.raises(MeterlyUsageError):
                handoffs.read(forged, name, task_id)


def test_f58_a_key_that_was_replaced_still_verifies(
    message: dict[str, Any], settings: Any
) -> None:
    old = settings.SECRET_KEY
    settings.SECRET_KEY = "another"
    arguments = ((), message["task_id"], message["headers"])
    assert deliver(jobs.handed_off, *arguments).info.state == "FAILURE"
    settings.SECRET_KEY_FALLBACKS = ["older", old]
    assert deliver(jobs.handed_off, *arguments).info is None
    assert states() == ["committed"]


def test_f58_the_fence_is_the_databases(
    message: dict[str, Any], customer: Customer
) -> None:
    """The same header, delivered again, finds the row claimed."""
    arguments = ((), message["task_id"], message["headers"])
    assert deliver(jobs.handed_off, *arguments).info is None
    assert deliver(jobs.handed_off, *arguments).info.state == "IGNORED"
    assert (states(), balance(customer)) == (["committed"], (75, 0))


@pytest.mark.parametrize("own", [{}, {"mine": 1}, {"headers": {"mine": 1}}])
def test_f58_a_task_id_of_the_projects_is_signed(
    customer: Customer, sent: list[Any], own: dict[str, Any]
) -> None:
    signature = jobs.handed_off.s().set(task_id="invoice-7", headers=own)
    with guard("user_1", 25) as work:
        assert work.hand_off(signature) == "invoice-7"
    assert deliver(jobs.handed_off, (), "invoice-7", sent[0]["headers"]).info is None
    assert states() == ["committed"]


def test_f62_a_hand_off_is_found_beside_headers_that_tracing_has_nested(
    customer: Customer, sent: list[Any]
) -> None:
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off_retries)
    traced = {**sent[0]["headers"], "trace": "1", "headers": {"trace": "1"}}
    task_id = sent[0]["task_id"]
    assert deliver(jobs.handed_off_retries, (), task_id, traced).info.state == "RETRY"
    # The retry has both again, wherever tracing puts its own.
    again = sent[1]["headers"]
    assert again == {"trace": "1", **sent[0]["headers"]}
    again = {**again, "headers": {"trace": "2"}, "retries": 1}
    assert deliver(jobs.handed_off_retries, (), task_id, again).info is None
    assert (states(), balance(customer)) == (["committed"], (93, 0))


@pytest.mark.parametrize("nested", [False, True])
def test_f58_a_revoked_hand_off_is_released_by_its_header(
    message: dict[str, Any], sent: list[Any], nested: bool
) -> None:
    headers = {**message["headers"], "id": message["task_id"]}
    if nested:
        headers["headers"] = {"trace": "1"}
    task_revoked.send(sender=jobs.handed_off, request=Context(headers))
    task_revoked.send(sender=jobs.handed_off, request=Context(id="no hand-off"))
    assert [each["name"] for each in sent[1:]] == [release_handed_off.name]
    assert release_handed_off(*sent[1]["args"]) is None
    assert states() == ["released"]


def test_f58_what_is_uncharged_is_signed_for_its_task(
    customer: Customer, sent: list[Any], settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "off"}
    with guard("user_1", 25) as work:
        task_id = work.hand_off(jobs.handed_off)
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "enforce"}
    headers = sent[0]["headers"]
    assert deliver(jobs.handed_off, (), task_id, headers).info is None
    for task, other in ((jobs.handed_off, "other"), (jobs.plain, task_id)):
        result = deliver(task, (), other, headers)
        assert result.info.state == "FAILURE"
    assert release_handed_off(headers[HEADER], "jobs.handed_off", task_id) is None
    assert (states(), balance(customer)) == ([], (100, 0))
