"""Captions as they are trained on: one clean line of text, put into the user's words."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from ldm.errors import UserError

# Control characters that are no white space, the invisible ones that editors and web pages leave (soft hyphen, zero
# width space, marks of direction, byte order mark), halves of characters. Joiners stay: emoji and scripts need them.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_SIDE = re.compile(r"(?<![^\W_])(left|right)(most|wards?|side|facing|hand(ed)?)?(?![^\W_])", re.IGNORECASE)


def clean(text: str) -> str:
    """Return a text as one line: NFC, without control characters, each stretch of white space a single space.

    >>> clean(" a red\\n  house\\x00 ")
    'a red house'
    """
    return " ".join(unicodedata.normalize("NFC", _CONTROL.sub("", text)).split())


def says_side(caption: str) -> bool:
    """Tell whether a caption says left or right: its picture mirrored would be another.

    >>> says_side("A dog on the Right-hand side"), says_side("a bright leftover")
    (True, False)
    """
    return _SIDE.search(caption) is not None


class Wording:
    """Put captions into a template such as "{caption}, by {artist}", between a prefix and a suffix.

    Args:
        template: text with `{caption}` and the names of other fields of the row; `{{` and `}}` are braces.
        prefix, suffix: put before and after as they are.

    Raises:
        UserError: the template cannot be read, asks for more than names, or has no `{caption}`.

    >>> Wording("{caption}, by {artist}", prefix="a drawing of ")({"artist": "Ann"}, ["a cat", ""])
    ['a drawing of a cat, by Ann', '']
    """

    def __init__(self, template: str = "{caption}", prefix: str = "", suffix: str = "") -> None:
        self.prefix, self.suffix = prefix, suffix
        self.parts: list[tuple[str, str | None]] = []  # a text, and the name of the field that comes after it
        where = f"data.caption_template='{template}'"
        try:
            for text, name, form, conversion in Formatter().parse(template):
                if name is not None and (form or conversion or not re.fullmatch(r"[^.\[\]]+", name)):
                    given = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                    raise UserError(
                        f"{where}: {{{given}}} is not the plain name of a field; a name such as {{artist}} is all that "
                        "can stand in braces, and braces themselves are written twice"
                    )
                self.parts.append((text, name))
        except ValueError as error:
            raise UserError(f"{where} cannot be read: {error}; braces themselves are written twice") from error
        if "caption" not in (name for _, name in self.parts):
            raise UserError(f"{where} has no {{caption}} in it: every picture would get the same words")

    def __call__(self, row: Mapping[str, Any], captions: Sequence[str]) -> list[str]:
        """Word the captions of one picture.

        Args:
            row: the fields that the template may name. What they hold is inserted and never interpreted; a list is
                joined by commas, and what is not there (None) is left out.
            captions: as they were found; `{caption}` is each of them, whatever the row has under that name.

        Returns:
            A clean text for each caption; one that is empty stays empty, since it means that there is none.

        Raises:
            UserError: the row has no such field, or something in it that is no text.
        """
        return [self._worded(row, caption) if clean(caption) else "" for caption in captions]

    def _worded(self, row: Mapping[str, Any], caption: str) -> str:
        inserted = (text + ("" if name is None else self._field(row, name, caption)) for text, name in self.parts)
        return clean(self.prefix + "".join(inserted) + self.suffix)

    def _field(self, row: Mapping[str, Any], name: str, caption: str) -> str:
        if name == "caption":
            return clean(caption)
        if name not in row:
            there = ", ".join(map(str, row)) or "no others"
            raise UserError(f"data.caption_template names {{{name}}}, which is not there; there are: caption, {there}")
        return _text(row[name], name)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(_text(item, name) for item in value)
    raise UserError(f"data.caption_template names {{{name}}}, which holds {type(value).__name__}, not text")
