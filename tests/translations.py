"""Bring the message catalogues in step with the code.

::

    python -m tests.translations

finds the messages of ``django_meterly`` and of ``django_meterly.ledger``, which has a
catalogue, too. It adds new messages to each ``django.po``, removes old ones, and
compiles the ``django.mo``. It works without GNU gettext. A new message still needs its
``msgstr``.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from babel.messages.catalog import Catalog
from babel.messages.extract import DEFAULT_KEYWORDS, extract
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from django.utils.translation.template import templatize

import django_meterly

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(django_meterly.__file__).parent
#: Where there is a catalogue, and what it leaves to another one.
CATALOGUES = {PACKAGE: PACKAGE / "ledger", PACKAGE / "ledger": None}
LOCALES = ("de",)
KEYWORDS = {
    **DEFAULT_KEYWORDS,
    **{f"{name}_lazy": spec for name, spec in DEFAULT_KEYWORDS.items()},
}


def sources(folder: Path) -> Iterator[Path]:
    """Yield the files of *folder* whose messages are in its own catalogue."""
    other = CATALOGUES[folder]
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".py", ".html"} and (
            other is None or not path.is_relative_to(other)
        ):
            yield path


def extracted(folder: Path) -> Catalog:
    """Return the messages in the code and the templates of *folder*."""
    catalog = Catalog()
    for path in sources(folder):
        source = path.read_text("utf-8")
        if path.suffix == ".html":
            # Everything but the messages becomes noise, with indentation that Python
            # would refuse.
            noise = templatize(source, origin=str(path))
            source = "\n".join(line.lstrip() for line in noise.split("\n"))
        found = extract("python", BytesIO(source.encode()), KEYWORDS)
        for _line, message, _comments, _context in found:
            # No line numbers: they would change with every edit.
            where = path.relative_to(folder).as_posix()
            catalog.add(message, locations=[(where, None)])
    return catalog


def po_path(folder: Path, locale: str) -> Path:
    return folder / "locale" / locale / "LC_MESSAGES" / "django.po"


def read(path: Path, locale: str) -> Catalog:
    with path.open("rb") as file:
        return read_po(file, locale)


def untranslated(catalog: Catalog) -> list[str]:
    """Return the messages of *catalog* that have no translation, or half of one."""
    return [
        str(message.id)
        for message in catalog
        if message.id
        and not all(
            message.string if isinstance(message.string, tuple) else [message.string]
        )
    ]


def compiled(catalog: Catalog) -> bytes:
    """Return the ``.mo`` for *catalog*."""
    buffer = BytesIO()
    write_mo(buffer, catalog)
    return buffer.getvalue()


def main() -> None:
    for folder in CATALOGUES:
        for locale in LOCALES:
            path = po_path(folder, locale)
            path.parent.mkdir(parents=True, exist_ok=True)
            catalog = read(path, locale) if path.exists() else Catalog(locale)
            _set_headers(catalog)
            catalog.update(
                extracted(folder),
                no_fuzzy_matching=True,
                update_creation_date=False,
            )
            catalog.obsolete.clear()
            with path.open("wb") as file:
                write_po(file, catalog, width=88, sort_output=True)
            path.with_suffix(".mo").write_bytes(compiled(read(path, locale)))
            print(f"{path.relative_to(PACKAGE.parent)}: {len(catalog)} messages")
            for message in untranslated(catalog):
                print(f"  without a translation: {message}")


def _set_headers(catalog: Catalog) -> None:
    # Otherwise Babel writes placeholders here.
    catalog.header_comment = "# Messages of django-meterly."
    catalog.project, catalog.version = "django-meterly", django_meterly.__version__
    catalog.msgid_bugs_address = catalog.last_translator = catalog.language_team = ""
    catalog.revision_date = catalog.creation_date
    catalog.fuzzy = False


if __name__ == "__main__":
    main()
