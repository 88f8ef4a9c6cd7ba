"""``docs/quickstart.md``, typed in as it stands.

::

    python -m tests.quickstart       # in a new virtual environment

does what the page says with everything installed anew, as a newcomer would, and then
what ``tests/test_quickstart.py`` does with it.
"""

from __future__ import annotations

import shlex
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tests.pages import DOCS, ROOT, blocks
from tests.projects.running import Project, environment

if TYPE_CHECKING:
    from tests.projects.running import Browser

SUPERUSER = {
    "DJANGO_SUPERUSER_USERNAME": "alice",
    "DJANGO_SUPERUSER_PASSWORD": "a password",
    "DJANGO_SUPERUSER_EMAIL": "alice@example.com",
}


def type_in(folder: Path, python: str = "") -> Project:
    """Do what the page says, in *folder*; return the project that it makes.

    With a *python* of your own, the package is installed for it.
    """
    project = Project(folder, python or sys.executable, environment(**SUPERUSER))
    if python:
        del project.env["PYTHONPATH"]
    for block in blocks(DOCS / "quickstart.md"):
        if block.language == "console":
            for command in block.commands:
                _run(project, command, install=bool(python))
            continue
        assert block.file, f"{block} does not say which file it belongs into."
        file = project.folder / block.file
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as written:
            written.write(f"\n{block.source}")
    return project


def _run(project: Project, command: str, *, install: bool) -> None:
    program, *arguments = shlex.split(command)
    if program == "cd":
        project.folder /= arguments[0]
    elif program == "pip":
        assert arguments == ["install", "django-meterly"]
        if install:
            project.run(project.python, "-m", "pip", "install", "--quiet", str(ROOT))
    elif program == "django-admin":
        project.run(project.python, "-m", "django", *arguments)
    elif arguments == ["manage.py", "createsuperuser"]:
        # It would ask for what the environment says.
        project.manage("createsuperuser", "--noinput")
    else:
        assert program == "python", command
        project.run(project.python, *arguments)


def try_out(project: Project) -> None:
    """Order posters and a video as the page says, and see what they cost."""
    with project.serving() as visitor:
        away = visitor.send("/order/", title="Sunset")
        assert away.status_code == 302
        assert away.headers["Location"].startswith("/admin/login/")
        visitor.log_in("alice", "a password")
        poor = visitor.send("/order/", title="Sunset")
        assert poor.status_code == 402
        assert "Not enough credits" in poor.text
        _grant_in_the_admin(visitor)
        assert _available(project) == 100
        project.shell(
            "from django.contrib.auth.models import User\n"
            "from studio.welcome import welcome\n"
            "welcome(User.objects.get()); welcome(User.objects.get())"
        )
        assert _available(project) == 200
        invalid = visitor.send("/order/", title="")
        assert (invalid.status_code, _available(project)) == (200, 200)
        charged = visitor.send("/order/", title="Sunset")
        assert "Sunset" in charged.text
        assert (charged.status_code, _available(project)) == (200, 175)
        rendered = visitor.send("/render/", form="/order/", title="Sunset")
        assert (rendered.status_code, _available(project)) == (200, 150)
        broken = visitor.send("/order-by-class/", title="")
        assert (broken.status_code, _available(project)) == (200, 150)
        by_class = visitor.send("/order-by-class/", title="Sunset")
        assert by_class.headers["Location"] == "/order/"
        assert _available(project) == 125
    job = project.shell(
        "from django.contrib.auth.models import User\n"
        "from django_meterly import get_client, grants\n"
        "from django_meterly.models import Customer\n"
        "from mysite.celery import app\n"
        "from studio.tasks import render_video\n"
        "app.finalize(); app.loader.import_default_modules()\n"
        "swept = {each['task'] for each in app.conf.beat_schedule.values()}\n"
        "assert swept and swept <= {*app.tasks}\n"
        "grants.grant(get_client(), Customer.objects.get(), 100, 'gpu_seconds', "
        "reason='A test', reference='test')\n"
        "print(render_video.apply([User.objects.get().pk]).state)"
    )
    assert job == "SUCCESS"
    assert _available(project, "gpu_seconds") == 99
    project.manage("meterly_settle")
    project.manage("meterly_ledger_verify")


def _grant_in_the_admin(staff: Browser) -> None:
    customers = "/admin/meterly/customer/"
    # 402 was asked for by a customer who is there since.
    chosen = staff.send(
        customers, action="grant_credits", _selected_action="1", index="0"
    )
    sent = staff.send(
        chosen.headers["Location"], amount="100", unit="image_credits", reason="A gift"
    )
    assert sent.headers["Location"] == f"{customers}1/change/", sent.text


def _available(project: Project, unit: str = "image_credits") -> int:
    with closing(sqlite3.connect(project.folder / "db.sqlite3")) as database:
        ((available,),) = database.execute(
            "SELECT balance - reserved FROM meterly_ledger_account WHERE unit = ?",
            [unit],
        )
    return int(available)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        project = type_in(folder, str(venv / "bin" / "python"))
        try_out(project)
    print("The quickstart works as it stands.")


if __name__ == "__main__":
    main()
