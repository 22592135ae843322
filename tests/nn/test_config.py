import pytest

from ldm.nn.config import choose, per_level, plain_options, read_config


class Net:
    def __init__(self, width: int = 3, name: str = "a") -> None: ...


def test_options_are_picked_and_bookkeeping_is_skipped():
    config = {"_class_name": "Net", "width": 5, "note": "x", "gate": None}
    assert read_config(config, Net, off={"gate": (None, False)}, inert=("note",)) == {"width": 5}


def test_every_refused_option_is_named():
    with pytest.raises(ValueError, match="Net: ") as error:
        read_config({"gate": True, "wdith": 5}, Net, off={"gate": (None, False)})
    assert "option gate=True in config.json is not supported (only None or False)" in str(error.value)
    assert "option wdith=5 in config.json is not known" in str(error.value)


def test_plain_options_are_ready_for_json():
    assert plain_options({"self": Net(), "a": (1, 2), "b": "text", "c": None}) == {"a": [1, 2], "b": "text", "c": None}


def test_per_level_refuses_another_number_of_levels():
    assert per_level("Net", "heads", (1, 2), 2) == [1, 2]
    with pytest.raises(ValueError, match=r"Net: heads=\(1, 2\) has 2 entries, but block_out_channels has 3 levels"):
        per_level("Net", "heads", (1, 2), 3)


def test_choose_names_the_choices():
    with pytest.raises(ValueError, match=r"option act='x' is not supported.*silu, gelu"):
        choose("Net", "act", "x", ["silu", "gelu"])
