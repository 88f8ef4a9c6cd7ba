"""Every message is in the catalogues, and every user-visible text is a message."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from babel.messages.mofile import read_mo
from django.apps import apps
from django.contrib import admin
from django.contrib.auth.models import User
from django.template.loader import get_template
from django.utils.functional import Promise
from django.utils.translation import gettext, ngettext, override

from django_meterly.ledger.models import ApiKey, Workspace
from tests import translations
from tests.books import fund
from tests.translations import CATALOGUES, LOCALES, PACKAGE

every_catalogue = pytest.mark.parametrize(
    ("folder", "locale"),
    [(folder, locale) for folder in CATALOGUES for locale in LOCALES],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)


@cache
def _catalogue(folder: Path, locale: str) -> Any:
    return translations.read(translations.po_path(folder, locale), locale)


def _messages(catalog: Any) -> dict[Any, Any]:
    # A plural is a list in one kind of file, and a tuple in the other.
    return {
        _fixed(message.id): _fixed(message.string) for message in catalog if message.id
    }


def _fixed(text: Any) -> Any:
    return tuple(text) if isinstance(text, list) else text


@every_catalogue
def test_every_message_of_the_code_is_in_the_catalogue(
    folder: Path, locale: str
) -> None:
    # If not: python -m tests.translations
    found = _messages(translations.extracted(folder))
    assert len(found) > 50
    assert set(found) == set(_messages(_catalogue(folder, locale)))


@every_catalogue
def test_every_message_is_translated_and_none_is_fuzzy(
    folder: Path, locale: str
) -> None:
    catalog = _catalogue(folder, locale)
    assert translations.untranslated(catalog) == []
    assert [message.id for message in catalog if message.id and message.fuzzy] == []
    assert not catalog.obsolete


@every_catalogue
def test_translations_have_the_placeholders_of_their_messages(
    folder: Path, locale: str
) -> None:
    for source, translation in _messages(_catalogue(folder, locale)).items():
        if isinstance(source, str):
            assert _placeholders(source) == _placeholders(translation), source
        else:
            # The singular may leave the number out.
            assert _placeholders(source[1]) == _placeholders(translation[1]), source
            assert _placeholders(translation[0]) <= _placeholders("".join(source))


def _placeholders(text: str) -> set[str]:
    return set(re.findall(r"%\(\w+\)[sd]", text))


@every_catalogue
def test_the_compiled_catalogue_is_in_step(folder: Path, locale: str) -> None:
    path = translations.po_path(folder, locale).with_suffix(".mo")
    with path.open("rb") as file:
        compiled = read_mo(file)
    assert _messages(compiled) == _messages(_catalogue(folder, locale))


def test_a_message_has_the_same_translation_in_both_catalogues() -> None:
    # Django merges them: one would win.
    for locale in LOCALES:
        ours, ledgers = (_messages(_catalogue(folder, locale)) for folder in CATALOGUES)
        shared = ours.keys() & ledgers.keys()
        assert shared
        assert {key: ours[key] for key in shared} == {
            key: ledgers[key] for key in shared
        }


def test_django_finds_the_catalogues() -> None:
    with override("de"):
        assert gettext("Not enough credits") == "Nicht genug Guthaben"
        assert gettext("workspaces") == "Arbeitsbereiche"
        assert (
            ngettext("%(count)d key was revoked.", "%(count)d keys were revoked.", 2)
            == "%(count)d Schlüssel wurden widerrufen."
        )


# Nothing is left out of the catalogues


def _templates() -> list[Path]:
    return sorted(PACKAGE.rglob("*.html"))


@pytest.mark.parametrize("path", _templates(), ids=lambda path: path.name)
def test_a_template_shows_nothing_but_messages_and_variables(path: Path) -> None:
    text = path.read_text("utf-8")
    get_template(path.relative_to(PACKAGE / "templates").as_posix())
    text = re.sub(r"\{% blocktranslate.*?endblocktranslate %\}", "", text, flags=re.S)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    # The classes of the page.
    text = re.sub(r"\{% block bodyclass.*?endblock %\}", "", text, flags=re.S)
    for part in (r"\{#.*?#\}", r"\{%.*?%\}", r"\{\{.*?\}\}", r"<[^>]*>", r"&\w+;"):
        text = re.sub(part, "", text, flags=re.S)
    assert re.findall(r"\w+", text) == []


@pytest.mark.parametrize("label", ["meterly", "meterly_ledger"])
def test_the_models_names_are_messages(label: str) -> None:
    config = apps.get_app_config(label)
    assert isinstance(config.verbose_name, Promise)
    for model in config.get_models():
        names: list[Any] = [model._meta.verbose_name, model._meta.verbose_name_plural]
        for field in model._meta.fields:
            if field.name != "id":
                names += [
                    field.verbose_name,
                    field.help_text or model._meta.verbose_name,
                ]
                names += [name for _, name in field.choices or ()]
        assert [name for name in names if not isinstance(name, Promise)] == []


@pytest.mark.parametrize("label", ["meterly", "meterly_ledger"])
def test_the_admins_columns_are_in_german(label: str) -> None:
    config = apps.get_app_config(label)
    with override("en"):
        english = _columns(config)
    with override("de"):
        german = _columns(config)
    assert english.keys() == german.keys()
    same = {key for key, name in english.items() if german[key] == name}
    assert same <= {("Workspace", "name"), ("ApiKey", "name"), ("Hold", "status")}


def _columns(config: Any) -> dict[tuple[str, str], str]:
    columns = {}
    for model in config.get_models():
        model_admin = admin.site._registry.get(model)
        for name in model_admin.list_display if model_admin else ():
            label = admin.utils.label_for_field(name, model, model_admin)
            columns[model.__name__, name] = str(label)
    return columns


@pytest.fixture
def german(settings: Any, admin_client: Any) -> Any:
    settings.LANGUAGE_CODE = "de"
    return admin_client


@pytest.mark.django_db(transaction=True)
def test_the_admins_pages_speak_german(german: Any, joined: None) -> None:
    customer = fund(User.objects.create_user("alice"))
    page = german.get(f"/admin/meterly/customer/{customer.pk}/change/")
    for text in ("Guthaben im Hauptbuch", "Guthaben gutschreiben", "Verfügbar"):
        assert text in page.content.decode()
    url = f"/admin/meterly/customer/grant-credits/?ids={customer.pk}"
    page = german.post(url, {"amount": "5", "unit": "?", "reason": ""})
    assert "Eine Einheit besteht aus" in page.content.decode()
    key = ApiKey.objects.create(
        workspace=Workspace.objects.get(), name="ci", prefix="mk_", key_hash="0" * 64
    )
    page = german.post(
        "/admin/meterly_ledger/apikey/",
        {"action": "revoke", "_selected_action": [key.pk]},
        follow=True,
    )
    assert "1 Schlüssel wurde widerrufen." in page.content.decode()
    history = german.get(f"/admin/meterly_ledger/apikey/{key.pk}/history/")
    assert "Widerrufen." in history.content.decode()


@pytest.mark.django_db(transaction=True)
def test_a_refusal_is_in_the_clients_language(
    client: Any, joined: None, settings: Any
) -> None:
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django.middleware.locale.LocaleMiddleware",
    ]
    client.force_login(User.objects.create_user("alice"))
    answer = client.post("/paid/", headers={"accept-language": "de"})
    assert answer.json()["title"] == "Nicht genug Guthaben"
    assert "Hierfür sind 25 image_credits nötig" in answer.json()["detail"]
    page = client.post(
        "/paid/", headers={"accept-language": "de-AT", "accept": "text/html"}
    )
    assert '<html lang="de">' in page.content.decode()
    assert "Zurück" in page.content.decode()
    english = client.post("/paid/", headers={"accept-language": "fr"})
    assert english.json()["title"] == "Not enough credits"
    assert "Accept-Language" in english["Vary"]
