"""``{% load meterly %}``"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from django import template
from django.template.base import render_value_in_context
from django.utils.html import format_html

from .. import units
from ..views.keys import FORM_FIELD
from ..wire import shown

if TYPE_CHECKING:
    from django.template.base import FilterExpression, Parser, Token

register = template.Library()


@register.simple_tag
def meterly_form_key() -> str:
    """Render a hidden field that makes the form one piece of work.

    A guarded view runs once for it, however often the form is sent. Each
    rendering has a new key, so leave it out of cached fragments.
    """
    # Some browsers bring back what was in a form when its page is reloaded: the
    # new form would be the old piece of work.
    return format_html(
        '<input type="hidden" name="{}" value="{}" autocomplete="off">',
        FORM_FIELD,
        uuid.uuid4(),
    )


@register.filter
def meterly_unit(unit: str) -> str:
    """Return what people call the unit: ``{{ account.credit_unit|meterly_unit }}``."""
    return units.name_of(unit)


@register.tag
def meterly_credits(parser: Parser, token: Token) -> CreditsNode:
    """Render an amount, the number first, and its unit as people call it.

    ``{% meterly_credits 25 "image_credits" %}`` renders "25 image credits". Raises
    ``ValueError`` for a unit that is typed there and that ``UNITS`` does not declare. A
    variable may be another unit, of a balance for example: it is shown as it is. If it
    is empty, or not a text, that is a ``ValueError``, too.
    """
    name, *arguments = token.split_contents()
    if len(arguments) != 2:
        raise template.TemplateSyntaxError(
            f'{name} takes an amount and a unit: {{% {name} 25 "image_credits" %}}.'
        )
    return CreditsNode(*map(parser.compile_filter, arguments))


class CreditsNode(template.Node):
    def __init__(self, amount: FilterExpression, unit: FilterExpression) -> None:
        self.amount = amount
        self.unit = unit

    def render(self, context: Any) -> Any:
        # A variable that is not there is None.
        unit = self.unit.resolve(context, ignore_failures=True)
        if not self.unit.is_var:
            units.check_declared(unit)
        elif not isinstance(unit, str) or not unit:
            raise ValueError(
                f"The unit {self.unit.token} of meterly_credits must be a text, not "
                f"{shown(unit)}. Put quotes around a unit that is no variable: "
                '{% meterly_credits 25 "image_credits" %}.'
            )
        counted = units.counted(self.amount.resolve(context), unit)
        return render_value_in_context(counted, context)
