from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError

from ....db import DatabaseNow
from ....transports.base import check_text
from ...authentication import create_api_key
from ...conf import ledger_settings
from ...models import ApiKey
from ...operations import ensure_workspace

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(BaseCommand):
    help = "Create, list and revoke the API keys of the embedded ledger."

    def add_arguments(self, parser: ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        create = actions.add_parser("create", help="Create a key and print it, once.")
        create.add_argument("name", help="What the key is for.")
        create.add_argument(
            "--workspace",
            help="The workspace, created when new. "
            'Default: METERLY_LEDGER["WORKSPACE"].',
        )
        create.add_argument(
            "--test", action="store_true", help="Begin the key with mk_test_."
        )
        create.add_argument(
            "--hmac",
            action="store_true",
            help="A key that signs requests, and whose secret is never sent.",
        )
        create.add_argument(
            "--scope",
            choices=ApiKey.Scope.values,
            default=ApiKey.Scope.WRITE.value,
            help="What the key may do (%(default)s, which includes read).",
        )
        actions.add_parser("list", help="List the keys; none is shown in full.")
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
        scope: str,
        **options: Any,
    ) -> None:
        if test and hmac:
            raise CommandError("--test is for bearer keys, not with --hmac.")
        if workspace is None:
            workspace = ledger_settings.WORKSPACE
        try:
            owner = ensure_workspace(check_text(workspace, "--workspace"))
        except ValueError as exc:
            raise CommandError(str(exc)) from exc
        row, key = create_api_key(owner, name, test=test, hmac=hmac, scope=scope)
        # The key alone on stdout, so that it can be piped to where it belongs.
        self.stderr.write(
            f"Key {row.pk} of workspace {owner}. It is not stored and cannot be "
            "shown again:"
        )
        self.stdout.write(key)

    def list(self, **options: Any) -> None:
        for row in ApiKey.objects.select_related("workspace").order_by("pk"):
            state = f"revoked {row.revoked_at:%Y-%m-%d}" if row.revoked_at else "active"
            used = "never used"
            if row.last_used_at:
                used = f"last used {row.last_used_at:%Y-%m-%d %H:%M}"
            cells = (row.pk, row.workspace, row, row.kind, row.scope, state, used)
            self.stdout.write("\t".join(map(str, cells)))

    def revoke(self, *, id: int, **options: Any) -> None:  # noqa: A002
        if not ApiKey.objects.active().filter(pk=id).update(revoked_at=DatabaseNow()):
            raise CommandError(f"There is no active key {id}.")
        self.stderr.write(f"Key {id} is revoked.")
