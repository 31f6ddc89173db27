"""What clients send, read within limits: JSON bodies, and numbers in headers. A refusal names the field."""

from __future__ import annotations

import re
from typing import Protocol, TypeVar

import msgspec

from chiasm.errors import Code, InvalidRequestError
from chiasm.http.json_size import check_json_size

_T_co = TypeVar("_T_co", covariant=True)
_PLACE = re.compile(r" - at `(?P<place>[^`]*)`(?: in `(?P<outer>[^`]*)`)?$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_FIELD = re.compile(r"\$\.(\w+)")
_BYTE = re.compile(r"\(byte (\d+)\)")
_HALF_PAIR = re.compile(rb"(?<!\\)\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|[c-fC-F][0-9a-fA-F]{2})")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_BEFORE_BYTES, _AFTER_BYTES = 80, 16


class Decoder(Protocol[_T_co]):
    """A decoder of msgspec."""

    def decode(self, body: bytes, /) -> _T_co: ...


def read_json(decoder: Decoder[_T_co], body: bytes) -> _T_co:
    """Return what a request's body says. Raises InvalidRequestError that names the wrong field, or for too many values."""
    check_json_size(body)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        place, field = _PLACE.search(message), _FIELD.search(message)
        where = (place["outer"] or place["place"]).removeprefix("$.") if place else ""
        if missing := _MISSING.match(message):
            name = missing[1]
            raise InvalidRequestError(
                f"The field {name} is missing{f' in {where}' if where else ''}; send it.",
                param=field[1] if field else name,
            ) from None
        what = message[: place.start()] if place else message
        raise InvalidRequestError(
            f"{what} {f'at {where}' if where else 'as the body'}.", param=field and field[1]
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not body.strip():
            raise InvalidRequestError("The body is empty; send a JSON object.", code=Code.INVALID_JSON) from None
        why = "it is not in UTF-8" if _is_of_encoding(error) else str(error)
        raise InvalidRequestError(
            f"The body is not valid JSON: {why}{_near(body, error)}.", code=Code.INVALID_JSON
        ) from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.", code=Code.INVALID_JSON) from None


def whole_number(header: str, text: str) -> int:
    """Return the number in a header, of at most 18 digits. Raises InvalidRequestError."""
    if not _WHOLE_NUMBER.fullmatch(text.strip()):
        raise InvalidRequestError(f"{header} must be a whole number of at most 18 digits.")
    return int(text)


def _is_of_encoding(error: Exception) -> bool:
    """Whether it says that the body is not in UTF-8: msgspec has an error of its own for that since version 0.23."""
    return isinstance(error, UnicodeDecodeError) or "UTF-8" in str(error)


def _near(body: bytes, error: Exception) -> str:
    """Return what stands where the JSON is wrong, as far as the error tells the place or it can be found."""
    if byte := _BYTE.search(str(error)):
        at = int(byte[1])
    elif half := _HALF_PAIR.search(body):
        at = half.start()
    else:
        try:
            body.decode()
        except UnicodeDecodeError as wrong:
            at = wrong.start
        else:
            return ""
    shown = body[max(0, at - _BEFORE_BYTES) : at + _AFTER_BYTES].decode(errors="replace")
    return f", near {shown!r}"
