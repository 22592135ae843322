"""What a user plugs in by a dotted path: built from the composed config, never from a file of somebody else's."""

import pydoc
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError


def build(node: Any) -> Any:
    """Call what `_target_` names with the other keys; what stands in lists and mappings below it first.

    As `hydra.utils.instantiate`, which however interpolates texts anew: one that holds `${oc.env:…}` as it was typed
    would become what the environment holds.

    Raises:
        UserError: it cannot be imported, or does not take these arguments.

    >>> build({"_target_": "builtins.dict", "name": "${oc.env:HOME}", "of": [{"_target_": "builtins.list"}]})
    {'name': '${oc.env:HOME}', 'of': [[]]}
    """
    if isinstance(node, list | tuple):
        return [build(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {key: build(each) for key, each in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    target = str(node["_target_"])
    try:
        found: Any = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"_target_={target} cannot be imported: {error.value!r}") from error
    if not callable(found):
        raise UserError(f"_target_={target} cannot be imported: nothing that can be called has this name")
    try:
        return found(**arguments)
    except (TypeError, ImportError) as error:
        raise UserError(f"_target_={target} with {', '.join(arguments) or 'no arguments'}: {error}") from error
