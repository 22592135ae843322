"""What is plugged in by a dotted path: whose fault it is where it fails."""

import pytest

from ldm.errors import UserError
from ldm.plugins import build


class Mine:
    """A class of somebody's, which can fail in any way."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        self.size = size
        if error is not None:
            raise error


MINE = f"{__name__}.Mine"


def node(**arguments) -> dict:
    return {"_target_": MINE, **arguments}


def test_it_is_called_with_what_stands_beside_it():
    assert build(node(size=3)).size == 3
    assert build({"a": [node(size=node(size=1))]})["a"][0].size.size == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "with no arguments: missing a required argument: 'size'"),
        ({"size": 1, "sise": 2}, "with size, sise: got an unexpected keyword argument 'sise'"),
    ],
)
def test_wrong_arguments_are_an_error_for_people(arguments, told):
    with pytest.raises(UserError, match=f"_target_={MINE} {told}"):
        build(node(**arguments))


def test_wrong_arguments_of_what_does_not_say_what_it_takes():
    with pytest.raises(UserError, match=r"_target_=builtins\.min with a: "):
        build({"_target_": "builtins.min", "a": 1})


@pytest.mark.parametrize("bug", [TypeError("a bug"), ImportError("cannot import name"), KeyError("x")], ids=repr)
def test_a_bug_inside_is_raised_as_it_is(bug):
    with pytest.raises(type(bug)) as raised:
        build(node(size=1, error=bug))
    assert raised.value is bug


@pytest.mark.parametrize("error", [UserError("mend this"), ModuleNotFoundError("No module named 'wandb'")], ids=repr)
def test_what_people_can_mend_is_an_error_for_them(error):
    with pytest.raises(UserError, match=str(error)):
        build(node(size=1, error=error))


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_convert_", "_recursive_"])
def test_other_keys_of_hydra_are_named_as_unknown(key):
    with pytest.raises(UserError, match=f"_target_={MINE} with {key}: of Hydra's keys, _target_ alone is known"):
        build(node(**{"size": 1, key: True}))
