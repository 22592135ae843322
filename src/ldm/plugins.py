"""What a user plugs in by a dotted path: built from the composed config, never from a file of somebody else's."""

import inspect
import pydoc
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError

UNKNOWN = ("_args_", "_convert_", "_partial_", "_recursive_")  # to us, of what Hydra's `instantiate` heeds


def build(node: Any) -> Any:
    """Call what `_target_` names with the other keys; what stands in lists and mappings below it first.

    As `hydra.utils.instantiate`, which however interpolates texts anew: one that holds `${oc.env:…}` as it was typed
    would become what the environment holds. Of the keys that Hydra heeds `_target_` alone is known here. What goes
    wrong inside of what is called is raised as it is, for whoever wrote that.

    Raises:
        UserError: it cannot be imported, does not take these arguments, or wants a package that is not installed.

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
    if unknown := [key for key in UNKNOWN if key in node]:
        raise UserError(f"_target_={target} with {', '.join(unknown)}: of Hydra's keys, _target_ alone is known here")
    try:
        found: Any = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"_target_={target} cannot be imported: {error.value!r}") from error
    if not callable(found):
        raise UserError(f"_target_={target} cannot be imported: nothing that can be called has this name")
    told = f"_target_={target} with {', '.join(map(str, arguments)) or 'no arguments'}"
    wrong: tuple[type[Exception], ...] = (ModuleNotFoundError,)
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{told}: {error}") from error
    except ValueError:  # written in C: what it takes, it says when it is called
        wrong += (TypeError,)
    try:
        return found(**arguments)
    except wrong as error:
        raise UserError(f"{told}: {error}") from error
