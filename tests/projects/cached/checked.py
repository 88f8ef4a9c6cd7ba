"""What the checks say of each way to tell django-cachalot what to cache."""

from __future__ import annotations

from django.core.checks import run_checks
from django.test import override_settings

ALL = ["meterly", "meterly_ledger"]
CASES: list[tuple[dict[str, object], list[str]]] = [
    ({"UNCACHABLE_APPS": ALL}, []),
    ({}, ALL),
    ({"ENABLED": False}, []),
    ({"UNCACHABLE_APPS": ["meterly"]}, ["meterly_ledger"]),
    ({"ONLY_CACHABLE_APPS": ["auth"]}, []),
    ({"ONLY_CACHABLE_APPS": ["auth", "meterly_ledger"]}, ["meterly_ledger"]),
    ({"ONLY_CACHABLE_TABLES": ["auth_user"]}, []),
    ({"ONLY_CACHABLE_TABLES": ["meterly_customer"]}, ["meterly"]),
    ({"UNCACHABLE_TABLES": ["meterly_customer"]}, ALL),
]


def main() -> None:
    for options, expected in CASES:
        values = {"UNCACHABLE_APPS": [], **options}
        with override_settings(**{f"CACHALOT_{k}": v for k, v in values.items()}):
            found = [m for m in run_checks() if m.id == "meterly.W011"]
            told = [label for label in ALL if any(f"{label!r}" in m.msg for m in found)]
            assert told == expected, (options, told)
            assert len(found) == len(told)
    print(len(CASES), "cases")
