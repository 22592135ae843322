"""What may be shown: texts without the secrets of the environment, and without what a terminal would obey."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

# Words in the names of environment variables that hold something secret: WANDB_API_KEY, HF_TOKEN, DB_PASSWORD_2. PWD
# and PAT are such words after another alone: a shell's PWD is where it stands.
_SECRET = re.compile(
    r"(^|_)((API)?(KEY|TOKEN|SECRET|PASSPHRASE|CREDENTIAL|AUTH|DSN)|[A-Z]*(PASSWORD|PASSWD)|(SSH)?PASS|"
    r"CONNECTION_STRING|(?<=_)(PWD|PAT))S?\d*(_|$)",
    re.IGNORECASE,
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


def fingerprinted(value: Any) -> Any:
    """Return a value as it may be kept to compare others with: one that holds secrets redacted, and with a digest.

    >>> fingerprinted({"lr": 1e-3})
    {'lr': 0.001}
    """
    shown = redacted(value)
    return value if _digest(shown) == _digest(value) else f"{shown}{_digest(value)}"


def is_same(kept: Any, value: Any) -> bool:
    """Tell whether `fingerprinted` has kept this value, whatever the environment held then and holds now."""
    return kept == value or (isinstance(kept, str) and kept.endswith(_digest(value)))


def _digest(value: Any) -> str:
    return f" sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]}"


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
