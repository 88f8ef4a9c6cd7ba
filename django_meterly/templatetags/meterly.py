"""``{% load meterly %}``"""

from __future__ import annotations

import uuid

from django import template
from django.utils.html import format_html

from ..keys import FORM_FIELD

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
