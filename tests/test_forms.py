from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ValidationError
from django.utils import formats
from django.utils.translation import override

from django_meterly.forms import AmountField
from django_meterly.wire import MAX_AMOUNT
from tests.books import balance, fund

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import Client

LANGUAGES = ["en", "de", "fr", "de-ch", "hi", "ar", "pl", "pt-br", "en-gb", "fa"]
#: What people write, and the number they can mean by it. None is never a number.
WRITTEN: dict[str, int | None] = {
    "10000": 10_000,
    " 10000 ": 10_000,
    "10.000": 10_000,
    "10,000": 10_000,
    "10'000": 10_000,
    "10\N{RIGHT SINGLE QUOTATION MARK}000": 10_000,
    "10 000": 10_000,
    "10\N{NO-BREAK SPACE}000": 10_000,
    "10\N{NARROW NO-BREAK SPACE}000": 10_000,
    "10_000": 10_000,
    "1.000.000": 1_000_000,
    "1,000,000": 1_000_000,
    "1,00,000": 100_000,
    "1000000": 1_000_000,
    "10": 10,
    "\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT ZERO}": 10,
    "\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT ZERO}": 10,
    "१०": 10,
    "010": 10,
    "+5": 5,
    "10.0": 10,
    "10,0": 10,
    "10.": 10,
    "10.50": None,
    "10,50": None,
    "1e3": 1000,
    "-5": None,
    "\N{MINUS SIGN}5": None,
    "5-": None,
    "0x10": None,
    "1.000,5": None,
    "10 credits": 10,
    "10\n20": None,
    "1.0.0": None,
    "½": None,
    "²": None,
    "x": None,
    "9" * 5000: None,
}


def typed(text: str) -> int | None:
    """Return what the field makes of *text*, or ``None`` if it refuses that."""
    try:
        number: int = AmountField(min_value=1, max_value=MAX_AMOUNT).clean(text)
    except ValidationError:
        return None
    return number


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("text", WRITTEN, ids=lambda text: ascii(text)[:20])
def test_f70_an_amount_is_right_or_refused(
    settings: Any, grouped: bool, text: str
) -> None:
    settings.USE_THOUSAND_SEPARATOR = grouped
    for language in LANGUAGES:
        with override(language):
            assert typed(text) in (WRITTEN[text], None), language


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
def test_f70_an_amount_is_taken_as_django_writes_it(
    settings: Any, language: str, grouped: bool
) -> None:
    settings.USE_THOUSAND_SEPARATOR = grouped
    for number in (7, 999, 1000, 10_000, 1_234_567, MAX_AMOUNT):
        with override(language):
            assert typed(str(number)) == number
            assert typed(formats.localize(number)) == number
            assert typed(formats.number_format(number, force_grouping=True)) == number


@pytest.mark.parametrize(
    ("language", "text", "number"),
    [
        ("de", "10.000", 10_000),
        ("de", "10,000", None),
        ("en", "10,000", 10_000),
        ("en", "10.000", None),
        ("fr", "10 000", 10_000),
        ("de", "10.0", None),
        ("de", "10", 10),
    ],
)
def test_f70_a_separator_means_what_it_means_in_the_language(
    language: str, text: str, number: int | None
) -> None:
    with override(language):
        assert typed(text) == number


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("text", "granted"), [("10.000", 10_000), ("10,000", None), ("10.0", None)]
)
def test_f70_a_german_admin_grants_what_was_meant(
    admin_client: Client, user: User, text: str, granted: int | None
) -> None:
    customer = fund(user, 1)
    page = f"/admin/meterly/customer/grant-credits/?ids={customer.pk}"
    german = {"Accept-Language": "de"}
    form = admin_client.get(page, headers=german).context["form"]
    with override("de"):
        response = admin_client.post(
            page,
            {
                "amount": text,
                "unit": "image_credits",
                "reason": "Because",
                "reference": form["reference"].value(),
            },
            headers=german,
        )
    if granted is None:
        assert form.fields["amount"].error_messages["invalid"]
        assert response.context["form"].errors["amount"]
        assert text in response.content.decode()
    assert balance(customer) == (1 + (granted or 0), 0)
