"""The forms of the admin."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any, cast

from django import forms
from django.core.exceptions import ValidationError
from django.db import router
from django.utils import formats
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from .conf import meterly_settings, nearest
from .models import (
    UNIT_LENGTH,
    Customer,
    Grant,
    Reservation,
    replace_missing_owner_model,
)
from .wire import MAX_AMOUNT, check_text, check_unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    CustomerModelForm = forms.ModelForm[Customer]
else:
    CustomerModelForm = forms.ModelForm

# The admin imports this module before our own app is ready.
replace_missing_owner_model()

#: Units offered at most; any other may be typed.
KNOWN_UNITS = 50


class CustomerForm(CustomerModelForm):
    """Adds a customer with an owner, an external id, or both.

    Also gives an owner to a customer that never had one.
    """

    class Meta:
        model = Customer
        fields = ["owner", "external_id"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if field := self.fields.get("owner"):
            # An owner who was read from a replica cannot be assigned.
            queryset = cast(Any, field).queryset
            cast(Any, field).queryset = queryset.using(router.db_for_write(Customer))
        # Once the customer exists it is read-only, and no field.
        if field := self.fields.get("external_id"):
            field.required = False
            field.help_text = _(
                "Your own stable id for this customer. Leave it empty to derive it "
                "from the owner. It cannot be changed afterwards."
            )

    def clean_external_id(self) -> str:
        external_id = self.cleaned_data["external_id"]
        # Cleaned before this one, and absent if there was an error in it.
        owner = self.cleaned_data.get("owner")
        try:
            if external_id:
                return check_text(external_id, "external_id")
            if owner is not None:
                return Customer.objects.free_external_id(owner)
        except ValueError as exc:
            raise ValidationError(
                _(
                    "An external id is up to 255 printable ASCII characters, with no "
                    "space at either end."
                )
            ) from exc
        if "owner" in self.errors:
            return ""
        raise ValidationError(_("Choose an owner, or type an external id."))


class AmountField(forms.IntegerField):
    """Takes digits, or a number exactly as the active language writes it.

    For example, "10.000" is 10000 in German, and refused in English, where Django's
    own field would take it for 10.
    """

    # A number input leaves it to the browser what becomes of separators.
    widget = forms.TextInput(attrs={"class": "vIntegerField", "inputmode": "numeric"})
    default_error_messages = {
        "invalid": _("Write a whole number in digits only, for example 10000.")
    }

    def to_python(self, value: Any) -> int | None:
        # No language tells one space from another, and none decides by them.
        text = " ".join(str(value).split()) if value is not None else ""
        if text in self.empty_values:
            return None
        try:
            number = int(re.sub(r"\D", "", text))
        except ValueError as exc:
            raise ValidationError(self.error_messages["invalid"], "invalid") from exc
        written = formats.number_format(number, force_grouping=True)
        if text.isdecimal() or text == " ".join(written.split()):
            return number
        raise ValidationError(self.error_messages["invalid"], "invalid")


class GrantCreditsForm(forms.Form):
    """Asks for one grant, and names it before it is made.

    The reference is drawn when the form is shown: the same form sent twice asks
    for the same grant, which is made once.
    """

    amount = AmountField(label=_("Amount"), min_value=1, max_value=MAX_AMOUNT)
    # Where UNITS does not declare the units there are.
    unit: forms.Field = forms.CharField(
        label=_("Unit"),
        max_length=UNIT_LENGTH,
        widget=forms.TextInput(
            attrs={"class": "vTextField", "list": "meterly-known-units"}
        ),
    )
    reason = forms.CharField(
        label=_("Reason"),
        max_length=Grant._meta.get_field("reason").max_length,
        help_text=_("Kept with the grant, with your name."),
        widget=forms.TextInput(attrs={"class": "vTextField"}),
    )
    reference = forms.UUIDField(
        initial=uuid.uuid4,
        # Some browsers bring back what was in a form when its page is reloaded:
        # a new form with an old reference would grant nothing.
        widget=forms.HiddenInput(attrs={"autocomplete": "off"}),
    )
    #: The unit that nobody had before, and that the form has asked about.
    new_unit = forms.CharField(
        required=False, widget=forms.HiddenInput(attrs={"autocomplete": "off"})
    )

    def __init__(
        self, *args: Any, customers: Sequence[Customer] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.customers = customers
        if declared := meterly_settings.UNITS:
            self.fields["unit"] = forms.ChoiceField(
                label=_("Unit"), choices=list(declared.items())
            )
        self.fields["unit"].initial = meterly_settings.DEFAULT_UNIT

    @property
    def known_units(self) -> list[str]:
        """The units granted before, and the default one; none if ``UNITS`` has them."""
        if meterly_settings.UNITS:
            return []
        units = set(
            Grant.objects.values_list("unit", flat=True).distinct()[:KNOWN_UNITS]
        )
        if meterly_settings.DEFAULT_UNIT:
            units.add(meterly_settings.DEFAULT_UNIT)
        return sorted(units)

    def clean_unit(self) -> str:
        try:
            return check_unit(self.cleaned_data["unit"])
        except ValueError as exc:
            raise ValidationError(
                _(
                    "A unit is up to 64 letters, digits, “_”, “.” or “-”, and begins "
                    "with a letter or digit."
                )
            ) from exc

    def clean_reference(self) -> str:
        return f"admin-{self.cleaned_data['reference']}"

    def clean(self) -> dict[str, Any]:
        asked = self.cleaned_data
        warned_of = asked.pop("new_unit", "")
        unit = asked.get("unit")
        if unit and unit != warned_of and self._is_new(unit):
            data: Any = self.data
            self.data = data = data.copy()
            data["new_unit"] = unit
            self.add_error("unit", self._ask_about(unit))
        if not self.errors:
            before = Grant.objects.filter(
                customer__in=self.customers,
                unit=asked["unit"],
                reference=asked["reference"],
            )
            for first in before.select_related("customer").order_by("pk"):
                if not first.stands_for(asked["amount"]):
                    self.add_error(None, in_conflict(first))
        return asked

    def _is_new(self, unit: str) -> bool:
        """Return whether nobody has declared *unit*, or been granted or used any."""
        named = {meterly_settings.DEFAULT_UNIT, *meterly_settings.LOW_BALANCE}
        return (
            not meterly_settings.UNITS
            and unit not in named
            and not Grant.objects.filter(unit=unit).exists()
            and not Reservation.objects.filter(unit=unit).exists()
        )

    def _ask_about(self, unit: str) -> str:
        near = nearest(unit, self.known_units)
        if near is None:
            question = gettext(
                "Nobody has had “%(unit)s” so far, and a unit stays for good. To grant "
                "this new unit, send the form again."
            )
        else:
            question = gettext(
                "Nobody has had “%(unit)s” so far, and a unit stays for good. Did you "
                "mean “%(near)s”? To grant the new unit all the same, send the form "
                "again."
            )
        return question % {"unit": unit, "near": near}


def in_conflict(first: Grant) -> str:
    """Return what to say when the reference of *first* is used for another grant."""
    return gettext(
        "This form was sent before, for %(grant)s (%(state)s). Open it anew to make "
        "another grant."
    ) % {"grant": first, "state": first.get_state_display()}
