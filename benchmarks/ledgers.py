"""What is compared on the ledger's side: ours, the bare floor, and the peers.

The floor is what cannot be done without: two conditional UPDATEs, each its own
transaction, by psycopg alone, which prepares them. It keeps no hold, no entry and
no idempotency key.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from django.db import connection, transaction

from django_meterly.client import MeterlyClient
from django_meterly.errors import MeterlyInsufficientCreditsError
from django_meterly.ledger.transport import LedgerTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from .crew import Maker

MUCH = 10**12

#: The peers' names, as on PyPI.
WALLET, TOKENS, NOSTRO, ESCROW = (
    "dj-wallet",
    "django-ai-tokens-meter",
    "hf-nostro",
    "escrowmint",
)


def database_url() -> str:
    return os.environ["DATABASE_URL"]


# The floor


def create_floor(accounts: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE floor (id int PRIMARY KEY, balance bigint, reserved bigint)"
        )
        cursor.execute(
            "INSERT INTO floor SELECT n, %s, 0 FROM generate_series(1, %s) n",
            [MUCH, accounts],
        )


_HOLD = """UPDATE floor SET reserved = reserved + 1
    WHERE id = %s AND balance - reserved >= 1"""
_CHARGE = """UPDATE floor SET reserved = reserved - 1, balance = balance - 1
    WHERE id = %s AND reserved >= 1"""


def floor(accounts: int) -> Callable[[], None]:
    own = psycopg.connect(database_url(), autocommit=True)

    def run() -> None:
        account = random.randint(1, accounts)
        own.execute(_HOLD, [account])
        own.execute(_CHARGE, [account])

    return run


# This project


def create_customers(count: int) -> list[str]:
    client = MeterlyClient(transport=LedgerTransport())
    with transaction.atomic():
        grants = [
            client.grant_credits(f"user_{number}", MUCH, "credits", "opening")
            for number in range(count)
        ]
    return [grant.grant.customer_id for grant in grants]


def reserve_and_commit(customers: list[str]) -> Callable[[], None]:
    client = MeterlyClient(transport=LedgerTransport())

    def run() -> None:
        held = client.reserve_credits(random.choice(customers), 1, reference="job")
        client.commit_reservation(held.reservation_id)

    return run


def use(customers: list[str]) -> Callable[[], Any]:
    client = MeterlyClient(transport=LedgerTransport())
    return lambda: client.use_credits(random.choice(customers), 1, reference="job")


# The peers: each one charge of a hot account


class Peer:
    """One peer: *funded* makes an account, *charge* takes one credit from it.

    ``hold`` is what it offers for a hold before the work, if it does.
    """

    def funded(self, amount: int) -> Any:
        raise NotImplementedError

    def charge(self, account: Any) -> Callable[[], Any]:
        raise NotImplementedError

    def hold(self, account: Any) -> Callable[[], Any]:
        raise NotImplementedError


class Meterly(Peer):
    def funded(self, amount: int) -> str:
        client = MeterlyClient(transport=LedgerTransport())
        grant = client.grant_credits(uuid.uuid4().hex, amount, "credits", "opening")
        return grant.grant.customer_id

    def charge(self, account: str) -> Callable[[], Any]:
        return use([account])

    def hold(self, account: str) -> Callable[[], Any]:
        client = MeterlyClient(transport=LedgerTransport())
        return lambda: client.reserve_credits(account, 1)


class Wallet(Peer):
    def __init__(self) -> None:
        from dj_wallet.services.common import WalletService

        self.service = WalletService

    def funded(self, amount: int) -> Any:
        from dj_wallet.models import Wallet

        wallet = Wallet.objects.create(holder=_user(), slug="default")
        self.service.deposit(wallet, amount)
        return wallet

    def charge(self, account: Any) -> Callable[[], Any]:
        return lambda: self.service.withdraw(account, 1)

    def hold(self, account: Any) -> Callable[[], Any]:
        return lambda: self.service.withdraw(account, 1, confirmed=False)


class Tokens(Peer):
    def __init__(self) -> None:
        from ai_tokens.meter import TokenMeter

        self.meter = TokenMeter

    def funded(self, amount: int) -> Any:
        user = _user()
        self.meter(user).grant("purchase", amount)
        return user

    def charge(self, account: Any) -> Callable[[], Any]:
        return lambda: self.meter(account).consume(1)

    def hold(self, account: Any) -> Callable[[], Any]:
        # Left open: the work is still running.
        return lambda: self.meter(account).track(estimated=1).__enter__()


class Nostro(Peer):
    def __init__(self) -> None:
        from nostro import Ledger
        from nostro.migrate import migrate

        migrate(dsn=database_url(), scale=0)
        # It pools connections: one a process, and not the one of its parent.
        self._make = functools.cache(
            lambda process: Ledger(dsn=database_url(), scale=0)
        )

    def ledger(self) -> Any:
        return self._make(os.getpid())

    def funded(self, amount: int) -> Any:
        ledger = self.ledger()
        account = ledger.accounts.create("acme", uuid.uuid4().hex)
        ledger.credit(
            account,
            ledger.amount(amount),
            category="topup",
            idempotency_key=uuid.uuid4().hex,
        )
        return account

    def charge(self, account: Any) -> Callable[[], Any]:
        ledger = self.ledger()
        return lambda: ledger.debit(
            account,
            ledger.amount(1),
            category="job",
            idempotency_key=uuid.uuid4().hex,
        )


class Escrow(Peer):
    """On Redis, reserve and commit: the pair that ours is, too."""

    def __init__(self) -> None:
        from escrowmint import Client

        self.client = partial(Client.from_url, os.environ["REDIS_URL"])

    def funded(self, amount: int) -> str:
        wallet = uuid.uuid4().hex
        self.client().top_up(wallet, amount)
        return wallet

    def charge(self, account: str) -> Callable[[], Any]:
        client = self.client()

        def run() -> None:
            held = client.reserve(account, 1, ttl_ms=30_000)
            client.commit(account, held.reservation_id)

        return run

    def hold(self, account: str) -> Callable[[], Any]:
        client = self.client()
        return lambda: client.reserve(account, 1, ttl_ms=30_000)


PEERS: dict[str, type[Peer]] = {
    WALLET: Wallet,
    TOKENS: Tokens,
    NOSTRO: Nostro,
    ESCROW: Escrow,
}

#: What each raises when there is too little.
REFUSALS = {
    MeterlyInsufficientCreditsError.__name__,
    "InsufficientFunds",
    "InsufficientTokens",
    "InsufficientQuota",
}

_numbers = itertools.count()


def _user() -> Any:
    from django.contrib.auth.models import User

    return User.objects.create(username=f"{os.getpid()}-{next(_numbers)}")


#: What a project sets to have its statements prepared; Django does not, by itself.
PREPARED = {"server_side_binding": True, "prepare_threshold": 0}


def connected(
    make: Callable[[Any], Callable[[], Any]], argument: Any, **settings: Any
) -> Callable[[], Any]:
    """Return what *make* returns, to be run with other settings of the database."""
    run = make(argument)

    def there() -> None:
        # A process runs one thing after the other, and reconnects in between.
        if any(connection.settings_dict[name] != settings[name] for name in settings):
            connection.close()
            connection.settings_dict.update(settings)
        run()

    return there


def makers(customers: list[str]) -> dict[str, Maker]:
    """Return the floor and the pair of calls that is held against it."""
    return {
        "floor": partial(floor, len(customers)),
        "reserve + commit": partial(
            connected, reserve_and_commit, customers, OPTIONS={}
        ),
        "reserve + commit, prepared": partial(
            connected, reserve_and_commit, customers, OPTIONS=PREPARED
        ),
    }
