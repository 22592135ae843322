"""Whatever value a key of a config has, it is taken or refused by name."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldm.config import SCHEMAS, TrainConfig, check, known_keys
from ldm.errors import UserError
from runs import TINY, compose_values, run_script

BASES = {
    "train": [*TINY],
    "train hub": ["data=hub", "data.path=x", "perceptual=lpips", "discriminator=patchgan"],
    "train shards": ["data=shards", "data.path=x", "data.cache=false", "data.streaming=true"],
    "train mix": ["data=mix", "+source@data.sources.a=folder", "data.sources.a.path=x"],
    "sample": ["ckpt=x", "prompt=y"],
    "evaluate": ["ckpt=x"],
    "convert": ["src=x", "dst=y"],
}
WRONG: list[Any] = [{"a": {"b": 1}}, [[{}]], "no such word", "", "\udce9", -1, 10**30, math.nan, None]
# What a user plugs in takes any arguments, and is asked what it thinks of them when it is built.
FREE = ("optim.arguments", "autoencoder.optim.arguments", "clip.optim.arguments", "logger", "callbacks")
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(ANY_TEXT, each, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def bases() -> dict[str, dict[str, Any]]:
    return {name: compose_values(name.split()[0], overrides) for name, overrides in BASES.items()}


def complaint(name: str, values: dict[str, Any], key: str, value: Any) -> str | None:
    """Return what is said of a config with another value for a key; None where it is taken."""
    values = node = dict(values)
    *parents, last = key.split(".")
    for parent in parents:
        node[parent] = dict(node[parent]) if isinstance(node.get(parent), dict) else {}
        node = node[parent]
    node[last] = value
    try:
        check(SCHEMAS[name.split()[0]], values)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", BASES)
def test_any_wrong_value_of_any_key_is_refused_by_name(name, bases):
    base = bases[name]
    check(SCHEMAS[name.split()[0]], base)
    script, _, own = name.partition(" ")
    parts = ("data.", "autoencoder.") if own else ""  # the rest is as in the first
    for key in known_keys(script):
        for value in WRONG if key.startswith(parts) else ():
            told = complaint(name, base, key, value)
            if isinstance(value, dict) and not key.startswith(FREE):
                assert told is not None, key  # no key holds such a thing
            if told is not None:
                last = key.rpartition(".")[2]
                assert last in told or key.split(".")[0] in told, (key, value, told)


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_at_all_is_taken_or_refused(data, bases):
    name = data.draw(st.sampled_from([*BASES]))
    key = data.draw(st.sampled_from(known_keys(name.split()[0])))
    complaint(name, bases[name], key, data.draw(ANYTHING))


@given(ANYTHING)
@example([])
@example({"data": {"kind": "mix", "sources": {"a": {"kind": "mix"}}}})
@settings(max_examples=30, deadline=None)
def test_a_whole_config_that_is_anything(values):
    with pytest.raises(UserError):
        check(TrainConfig, values)


@pytest.mark.parametrize(
    "typed",
    [
        "optim.lr=[1", "optim.lr={a: 1}", "optim=null", "trainer=3", "stages=[[]]", "++optim.arguments=3",
        "callbacks=3",
        "+callbacks.x._target_=os", "+callbacks.x._target_=probes.StopAt", "seed=9999999999999999999999", "seed=é",
        "data.background=[1,2]", "~seed", "data.kind=${nowhere}", "trainer.devices=-1", "=3", "a b",
    ],
)  # fmt: skip
def test_what_is_typed_wrongly_is_an_error_for_people(typed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script("train", *TINY, f"output_dir={tmp_path}/out", "stages=[clip]", typed) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
