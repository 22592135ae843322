"""What may be shown: texts without the secrets of the environment, and without what a terminal would obey."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Words in the names of environment variables that hold something secret: WANDB_API_KEY, HF_TOKEN, DB_PASSWORD_2.
_SECRET = re.compile(
    r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIAL|AUTH|DSN)S?\d*(_|$)", re.IGNORECASE
)
_SHORTEST = 8  # characters: a shorter value may stand in any text by chance


def printable(text: str) -> str:
    r"""Return a text with escapes for all that is no letter, sign or space: names of files may hold anything.

    >>> printable("caf\udce9 \x1b[31m\n")
    'caf\\udce9 \\x1b[31m\\n'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def redacted(value: Any) -> Any:
    """Return a text, or lists and mappings with texts in them, with `${oc.env:NAME}` where a secret stood.

    It does not matter how it got there: by an interpolation in a config, or because a shell put it into a command.

    >>> redacted({"steps": 3, "headers": ("a", "b")})
    {'steps': 3, 'headers': ['a', 'b']}
    """
    return _without(value, _secrets())


def _secrets() -> list[tuple[str, str]]:
    """Return names and values, the longest value first: it may hold another."""
    found = [(name, value) for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET.search(name)]
    return sorted(found, key=lambda item: -len(item[1]))


def _without(value: Any, secrets: list[tuple[str, str]]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without(each, secrets) for each in value]
    if isinstance(value, str):
        for name, secret in secrets:
            value = value.replace(secret, f"${{oc.env:{name}}}")
    return value
