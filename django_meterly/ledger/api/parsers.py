from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any

from rest_framework.exceptions import ParseError
from rest_framework.parsers import BaseParser

from .exceptions import wrong_field

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BODY_BYTES = 64 * 1024


class StrictJSONParser(BaseParser):
    """Reads one JSON object, and refuses what readers disagree about.

    That is: a name that comes twice, text that is no UTF-8, and anything longer
    than 64 KiB. NaN and the infinities are read, as what no field takes, so that
    the refusal can name the field.
    """

    media_type = "application/json"

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        body = stream.read(MAX_BODY_BYTES + 1)
        if len(body) > MAX_BODY_BYTES:
            raise ParseError(f"The body is longer than {MAX_BODY_BYTES} bytes.")
        try:
            data = json.loads(body.decode(), object_pairs_hook=_object)
            # "\ud800" is valid JSON, but no text that can be stored or sent back.
            json.dumps(data, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as exc:
            raise ParseError(f"The body is not valid JSON: {exc}") from exc
        if not isinstance(data, dict):
            raise ParseError("The body is not a JSON object.")
        return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            shown = name.encode(errors="replace").decode()
            raise wrong_field(shown, "This field comes twice.")
        data[name] = value
    return data
