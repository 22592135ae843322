import os
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm import cli
from ldm.cli import FREE_TEXT_KEYS, nearest, quote_free_text
from ldm.config import SCHEMAS, known_keys
from ldm.errors import UserError
from runs import compose_values, run_script

# What means something to a shell, to Hydra or to OmegaConf, letters of all sorts, and whole traps.
NASTY = st.text(st.sampled_from(list("ab ,=:'\"()[]{}<>&|#!?*~@$%^\\/.-+;\t\n\r_0é中🙂\u200b")), max_size=20)
PIECES = st.lists(
    st.sampled_from(
        ["${", "}", "${oc.env:HOME}", "\\", "\\'", '\\"', "'", '"', "\\${", "a", " ", "=", ",", "null", "true", "1"]
    ),
    max_size=10,
).map("".join)
TEXT = st.one_of(NASTY, PIECES, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))


def typed(text: str, key: str = "prompt") -> str:
    """Return what reaches the program of `key=text` as a person types it."""
    [override] = OverridesParser.create().parse_overrides([quote_free_text(f"{key}={text}")])
    assert override.key_or_group == key
    return override.value()


def looks_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    return "hunter2"


# ------------------------------------------------------------------------------------------------------- free text


@given(TEXT.filter(lambda text: not looks_quoted(text)))
@example("a red circle, (small) = 'quoted' \"twice\" ${oc.env:HOME} \\ #1 {x} [y] 中文 é 🙂\nand a second line ")
@example("???")
@example("null")
@example("true")
@example("1e-3")
@example(" leading and trailing ")
@example("ends in a backslash \\")
@example("ends in a quote and backslashes \\\\\\'")
@example("\\\\${x}")
@example("[a,b]")
@example("{a:b}")
@example("a=b=c")
@example("$x ${y")
@settings(max_examples=60, deadline=None)
def test_any_prompt_arrives_as_it_was_typed(text):
    values = compose_values("sample", [quote_free_text(f"prompt={text}"), quote_free_text(f"negative_prompt={text}")])
    assert values["prompt"] == text
    assert values["negative_prompt"] == text


@given(TEXT.filter(lambda text: not looks_quoted(text)), st.sampled_from(FREE_TEXT_KEYS))
@settings(max_examples=300, deadline=None)
def test_any_free_text_key_is_one_override_and_a_string(text, key):
    value = typed(text, key)
    assert isinstance(value, str)
    if "${" not in text:  # OmegaConf takes its escapes away later
        assert value == text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt='a, b'", "a, b"),
        ('prompt="a = b"', "a = b"),
        (r"prompt='it\'s'", "it's"),
        (r'prompt="say \"hi\""', 'say "hi"'),
        ("prompt=''", ""),
        ('prompt=""', ""),
        ("prompt=", ""),
        (r"prompt='\\'", "\\"),
    ],
)
def test_what_is_already_quoted_means_what_hydra_says(argument, value):
    assert quote_free_text(argument) == argument
    assert compose_values("sample", [quote_free_text(argument)])["prompt"] == value


@pytest.mark.parametrize(
    "text", ["'a' and 'b'", "'", '"', "'''", "\"a\" or 'b'", "'a\\'", "rock 'n' roll'", "'n' roll '"]
)
def test_quotes_at_both_ends_are_not_always_a_pair(text):
    assert compose_values("sample", [quote_free_text(f"prompt={text}")])["prompt"] == text


@pytest.mark.parametrize("quotes", ["{}", "'{}'", '"{}"'])
@pytest.mark.parametrize("backslashes", range(6))
@pytest.mark.parametrize(
    "text", ["${oc.env:A_SECRET}", "a ${oc.env:A_SECRET} b ${oc.env:A_SECRET}", "${ckpt}", "${a:${b}}"]
)
def test_nothing_is_ever_interpolated_into_free_text(text, backslashes, quotes, secret):
    prompt = quotes.format("\\" * backslashes + text)
    values = compose_values("sample", ["ckpt=other", quote_free_text(f"prompt={prompt}")])
    assert secret not in values["prompt"] and "other" not in values["prompt"]
    assert "${" in values["prompt"]
    if quotes == "{}":
        assert values["prompt"] == prompt


@pytest.mark.parametrize(
    "argument", ["steps=20", "-m", "--cfg", "optim.lr=1e-3,2e-3", "unet=tiny,small", "prompt", "--help=x"]
)
def test_other_arguments_are_left_alone(argument):
    assert quote_free_text(argument) == argument


def test_keys_with_plus_signs_are_free_text_too():
    assert quote_free_text("++prompt=a, b") == "++prompt='a, b'"
    assert quote_free_text("+vae.pretrained=modèles/vae") == "+vae.pretrained='modèles/vae'"


def test_free_text_keys_are_real_keys():
    assert set(FREE_TEXT_KEYS) <= {key for name in SCHEMAS for key in known_keys(name)}


def test_paths_of_the_train_config_are_free_text(tmp_path):
    for key in ("name", "output_dir", "data.path", "data.caption_column"):
        overrides = ["data=hub", "data.path=x", quote_free_text(f"{key}=a (b), ${{c}} é")]
        values = compose_values("train", overrides)
        for part in key.split("."):
            values = values[part]
        assert values == "a (b), ${c} é"


def test_paths_of_the_sources_in_a_mix_are_free_text_too():
    overrides = ["data=mix", "+source@data.sources.a=folder", quote_free_text("data.sources.a.path=a (b), ${c} é")]
    assert compose_values("train", overrides)["data"]["sources"]["a"]["path"] == "a (b), ${c} é"


def test_several_columns_are_a_list():
    overrides = ["data=hub", quote_free_text("data.caption_column=[long,short]")]
    assert compose_values("train", overrides)["data"]["caption_column"] == ["long", "short"]
    overrides = ["data=shards", quote_free_text("data.path=[a.tar,b.tar]")]
    assert compose_values("train", overrides)["data"]["path"] == ["a.tar", "b.tar"]


# --------------------------------------------------------------------------------------------------- nearest, --help


def test_nearest_prefers_the_last_part_of_a_key():
    keys = ["optim.lr", "clip.optim.lr", "unet.block_out_channels", "trainer.max_steps", "autoencoder.max_steps"]
    assert nearest("optim.lrr", keys) == "; did you mean 'optim.lr'?"
    assert nearest("otpim.lr", keys) == "; did you mean 'optim.lr'?"
    assert nearest("max_steps", keys) == "; did you mean 'trainer.max_steps'?"  # the right key at the wrong level
    assert nearest("autoencoder.max_step", keys) == "; did you mean 'autoencoder.max_steps'?"
    assert nearest("xyzzy", keys) == ""
    assert nearest("x", []) == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_help_says_what_can_be_typed(name, flag, capsys):
    assert run_script(name, flag) == 0
    text = capsys.readouterr().out
    assert "python " + name + ".py" in text
    if name == "train":
        for group in ("experiment", "unet", "vae", "text_encoder", "optim", "trainer", "logger", "diffusion", "data"):
            options = [path.stem for path in (cli.CONF_DIR / group).glob("[!_]*.yaml")]
            line = next(line for line in text.splitlines() if line.split()[:1] == [group])
            assert all(option in line for option in options)
    else:
        stated = set(yaml.safe_load((cli.CONF_DIR / f"{name}.yaml").read_text())) - {"hydra", "defaults"}
        assert all(f"\n  {key}:" in text for key in stated)


# -------------------------------------------------------------------------------------------------------------- run


@pytest.fixture
def conf(tmp_path):
    """A small config folder of its own: `job.yaml` with a group."""
    (tmp_path / "size").mkdir()
    (tmp_path / "job.yaml").write_text(
        "defaults: [size: small, _self_, {override hydra/job_logging: none}, {override hydra/hydra_logging: none}]\n"
        "a: 1\nhydra: {output_subdir: null, run: {dir: .}}\n"
    )
    (tmp_path / "size" / "small.yaml").write_text("width: 1\n")
    (tmp_path / "size" / "broken.yaml").write_text("width: [1\n")
    return tmp_path


@pytest.fixture
def call(conf, monkeypatch, capsys):
    """Run a main function through the door; return its exit code and what it said."""
    monkeypatch.setitem(SCHEMAS, "job", SCHEMAS["sample"])
    monkeypatch.chdir(conf)

    def run(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["job.py", *arguments])
        code = 0
        try:
            cli.run(main, "job", "A job.", conf)
        except SystemExit as exit:
            code = int(exit.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def raising(error: BaseException):
    def main(cfg):
        raise error

    return main


def test_main_gets_the_composed_config(call):
    got = []
    assert call(got.append, "a=2", "size.width=3")[0] == 0
    assert got[0].a == 2 and got[0].size.width == 3


def test_a_user_error_is_one_message_and_code_2(call):
    assert call(raising(UserError("no such thing; do this")), "a=2") == (2, "", "error: no such thing; do this\n")


def test_ctrl_c_is_code_130_without_traceback(call):
    code, _, err = call(raising(KeyboardInterrupt()))
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), KeyError("bug"), AssertionError("bug")])
def test_a_bug_keeps_its_traceback(call, error):
    with pytest.raises(type(error)) as caught:
        call(raising(error))
    assert caught.value is error


def test_an_error_of_hydra_from_inside_the_program_keeps_its_traceback(call):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException):
        call(raising(InstantiationException("inside")))


def test_an_interpolation_that_leads_nowhere(call):
    code, _, err = call(lambda cfg: cfg.a, "a=${nowhere}")
    assert code == 2 and "nowhere" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sizee=small"], "unknown config key 'sizee'"),
        (["size=smal"], "no option 'smal' in group 'size'; did you mean 'small'? It has: broken, small"),
        (["size=xyzzy"], "no option 'xyzzy' in group 'size'. It has: broken, small"),
        (["size=broken"], "broken.yaml"),
        (["size.widht=3"], "unknown config key 'size.widht'; did you mean 'size.width'?"),
        (["a=(1"], "a=(1"),
        (["nonsense"], "nonsense"),
        (["a=1,2"], "Ambiguous"),
        (["~a.b"], "a.b"),
        (["size=null"], "NoneType"),
    ],
)
def test_faults_of_the_command_line(call, arguments, says):
    calls = []
    code, _, err = call(calls.append, *arguments)
    assert code == 2 and not calls
    assert says in err and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("typed", "write"),
    [
        ("unet.dropout=0.1", "+unet.dropout=0.1"),
        ("vae.pretrained=some/vae", "+vae.pretrained='some/vae'"),
        ("optim.arguments.eps=1e-6", "+optim.arguments.eps=1e-6"),
        ("optim.arguments={eps: 1e-6}", "++optim.arguments={eps: 1e-6}"),
    ],
)
def test_a_key_that_yaml_does_not_state_is_added_with_a_plus(typed, write, capsys, tmp_path):
    assert run_script("train", "experiment=shapes", f"output_dir={tmp_path / 'out'}", typed) == 2
    assert f"to add it write {write}\n" in capsys.readouterr().err
    assert run_script("train", "experiment=shapes", f"output_dir={tmp_path / 'out'}", write, "--cfg", "job") == 0
    assert not (tmp_path / "out").exists()


def test_a_sweep_ends_at_the_first_user_error(call):
    done = []

    def main(cfg):
        done.append(cfg.a)
        if cfg.a == 2:
            raise UserError("two is too much")

    code, _, err = call(main, "-m", "a=1,2,3")
    assert code == 2 and done == [1, 2] and err == "error: two is too much\n"


def test_nothing_is_written_by_hydra(call, conf):
    before = sorted(conf.rglob("*"))
    call(lambda cfg: None, "a=2")
    assert sorted(conf.rglob("*")) == before and Path.cwd() == conf and "outputs" not in os.listdir()
