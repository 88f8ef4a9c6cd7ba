from __future__ import annotations

from django import forms

from .models import Poster


class PosterForm(forms.ModelForm):
    class Meta:
        model = Poster
        fields = ["title", "style"]
        widgets = {
            "title": forms.TextInput(
                attrs={"placeholder": "Midsummer on the roof", "autocomplete": "off"}
            ),
            "style": forms.RadioSelect,
        }
