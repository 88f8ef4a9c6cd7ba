from __future__ import annotations

from django.db import migrations

from ..postgresql import create_functions, drop_functions


class Migration(migrations.Migration):
    # Nothing is done on other databases. On this one the functions are also made
    # anew after every migrate (see the app's configuration), so that a test
    # database built without migrations has them.
    dependencies = [("meterly_ledger", "0001_initial")]

    operations = [
        migrations.RunPython(
            lambda apps, editor: create_functions(editor.connection),
            lambda apps, editor: drop_functions(editor.connection),
        )
    ]
