"""Create, list and revoke API keys, as ``authentication`` and ``admin`` know them."""

from __future__ import annotations

import datetime as dt
import re
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from ....transports.base import check_text
from ...authentication import create_api_key
from ...conf import ledger_settings
from ...customers import ensure_workspace
from ...database import write_alias
from ...models import ApiKey

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from ...models import Workspace

#: The actor in the events of a key.
ACTOR = "meterly_ledger_apikey"
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def _duration(text: str) -> dt.timedelta:
    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if found is None:
        raise ArgumentTypeError(
            f'"{text}" is not a duration like "12h", "90d" or "52w".'
        )
    return dt.timedelta(**{_UNITS[found[2]]: int(found[1])})


class Command(BaseCommand):
    help = "Create, list and revoke the API keys of the embedded ledger."

    def add_arguments(self, parser: ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        create = actions.add_parser("create", help="Create a key and print it, once.")
        create.add_argument("name", help="What the key is for.")
        create.add_argument(
            "--workspace",
            help="The workspace, created when new. "
            'Default: METERLY_LEDGER["WORKSPACE"], and with --test that and "-test".',
        )
        create.add_argument(
            "--test",
            action="store_true",
            help="A key of a test workspace: it works in no other.",
        )
        create.add_argument(
            "--hmac",
            action="store_true",
            help="A key that signs requests, and whose secret is never sent.",
        )
        create.add_argument(
            "--scope",
            nargs="+",
            choices=ApiKey.Scope.values,
            default=[ApiKey.Scope.SPEND.value],
            help='What the key may do, as in "--scope spend grant". Default: spend. '
            "Each includes read.",
        )
        create.add_argument(
            "--expires",
            type=_duration,
            help='When the key ends: after hours, days or weeks, as in "90d". '
            "Default: never.",
        )
        actions.add_parser("list", help="List the keys, without their secrets.")
        revoke = actions.add_parser("revoke", help="Revoke a key, for good.")
        revoke.add_argument("id", type=int, help="The key's number in the list.")

    def handle(self, *args: Any, action: str, **options: Any) -> None:
        getattr(self, action)(**options)

    def create(
        self,
        *,
        name: str,
        workspace: str | None,
        test: bool,
        hmac: bool,
        scope: list[str],
        expires: dt.timedelta | None,
        **options: Any,
    ) -> None:
        if workspace is None:
            workspace = f"{ledger_settings.WORKSPACE}{'-test' if test else ''}"
        try:
            with transaction.atomic(using=write_alias()):
                owner = self._workspace(check_text(workspace, "--workspace"), test)
                row, key = create_api_key(
                    owner,
                    name,
                    scopes=scope,
                    expires_in=expires,
                    hmac=hmac,
                    actor=ACTOR,
                )
        except ValueError as exc:
            raise CommandError(str(exc)) from exc
        # Only the key on stdout, so that it can be piped into a secret store.
        self.stderr.write(
            f"Key {row.pk} of workspace {owner}. It is not stored and cannot be "
            "shown again:"
        )
        self.stdout.write(key)

    def _workspace(self, name: str, test: bool) -> Workspace:
        workspace = ensure_workspace(name, is_test=test)
        if test and not workspace.is_test:
            raise CommandError(
                f'The workspace "{name}" is not a test workspace. Name another one '
                "with --workspace: it is created."
            )
        if workspace.is_test and not test:
            raise CommandError(
                f'The workspace "{name}" is a test workspace: its keys need --test.'
            )
        return workspace

    def list(self, **options: Any) -> None:
        for row in ApiKey.objects.current().order_by("pk"):
            state = "active" if row.is_active else "not active"
            if row.revoked_at:
                state = f"revoked {row.revoked_at:%Y-%m-%d}"
            elif row.expires_at:
                tense = "expires" if row.is_active else "expired"
                state = f"{tense} {row.expires_at:%Y-%m-%d %H:%M}"
            used = "never used"
            if row.last_used_at:
                used = f"last used {row.last_used_at:%Y-%m-%d %H:%M}"
            scopes = ",".join(row.scopes)
            cells = (row.pk, row.workspace, row, row.kind, scopes, state, used)
            self.stdout.write("\t".join(map(str, cells)))

    def revoke(self, *, id: int, **options: Any) -> None:  # noqa: A002
        row = ApiKey.objects.filter(pk=id).first()
        if row is None or not row.revoke(actor=ACTOR):
            raise CommandError(f"There is no key {id}, or it is revoked already.")
        self.stderr.write(f"Key {id} is revoked.")
