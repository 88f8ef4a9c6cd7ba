from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models

from ..postgresql import create_functions, drop_functions


class Migration(migrations.Migration):
    dependencies = [("meterly_ledger", "0002_api_keys_and_records")]

    operations = [
        migrations.AlterField(
            model_name="entry",
            name="workspace",
            field=models.ForeignKey(
                db_constraint=False,
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="entries",
                to="meterly_ledger.workspace",
                verbose_name="workspace",
            ),
        ),
        # Nothing on other databases. On PostgreSQL the functions are also made
        # anew after every migrate, so that a test database that was built without
        # migrations has them.
        migrations.RunPython(
            lambda apps, editor: create_functions(editor.connection),
            lambda apps, editor: drop_functions(editor.connection),
        ),
    ]
