"""The door of every root script: free text as typed by a person, fast `--help`, and errors for people.

Hydra's command line is a grammar in which commas, quotes, parentheses, `${` and every non-ASCII letter mean something.
Values of free-text keys (prompts, paths) are therefore quoted before Hydra reads them.
"""

import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ldm import ranks
from ldm.errors import UserError, explaining_full_disk
from ldm.redact import printable, redacted

CONF_DIR = Path(__file__).parents[2] / "conf"
FREE_TEXT_KEYS = (
    "prompt", "negative_prompt", "prompt_file", "ckpt", "out", "name", "output_dir", "run_dir",
    "clip", "inception", "from_image", "init_image", "mask", "outpaint", "src", "dst",
    "data.path", "data.image_column", "data.caption_column", "data.caption_key",
    "data.caption_template", "data.caption_prefix", "data.caption_suffix",
    "autoencoder.perceptual.weights", "vae.pretrained", "text_encoder.pretrained", "unet.pretrained",
)  # fmt: skip
# Where these are no config groups, as they are in train.py, they are paths.
PART_KEYS = ("vae", "text_encoder", "unet", "tokenizer")


def quote_free_text(argument: str, keys: Iterable[str] = FREE_TEXT_KEYS) -> str:
    r"""Quote the value of `key=value` for Hydra when `key` holds free text.

    Everything after the first `=` is the text. A value already in a pair of quotes, and an empty one, are left alone,
    except that `${` never means an interpolation: what the environment holds stays out of prompts and pictures.

    >>> quote_free_text("prompt=a red circle, (small) on ${blue}")
    "prompt='a red circle, (small) on \\${blue}'"
    >>> quote_free_text("steps=20")
    'steps=20'
    """
    key, equals, text = argument.partition("=")
    # data.sources.<name>.path is to data=mix what data.path is to one source
    if not equals or not text or re.sub(r"^data\.sources\.[^.]+\.", "data.", key.lstrip("+")) not in keys:
        return argument
    if key.endswith((".caption_column", ".path")) and text.startswith("[") and text.endswith("]"):
        return argument  # several columns or shards
    # OmegaConf reads `${` as an interpolation unless an odd number of backslashes stands before it.
    if re.fullmatch(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", text, re.DOTALL):
        return f"{key}=" + re.sub(r"(?<!\\)((?:\\\\)*)\$\{", r"\1\\${", text)
    from hydra.core.override_parser.types import Quote, QuotedString

    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the candidate nearest to a misspelt word, or an empty string.

    Of a dotted key the last part counts first: the key may be right but stand at the wrong level.

    >>> nearest("optim.lrr", ["optim.lr", "autoencoder.optim.lr", "optim.clip_norm"])
    "; did you mean 'optim.lr'?"
    """

    def likeness(candidate: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return last, difflib.SequenceMatcher(None, word, candidate).ratio()

    best = max(candidates, key=likeness, default="")
    return f"; did you mean '{best}'?" if best and likeness(best)[0] >= 0.6 else ""


def run(main: Callable[[Any], Any], config_name: str, doc: str | None, config_dir: Path = CONF_DIR) -> None:
    """Compose `conf/<config_name>.yaml` with the command line by Hydra and call `main(cfg)`.

    Exits with code 2 and one clear message on bad input, 130 on Ctrl-C. What goes wrong before `main` is about the
    command line or a config file; an exception from inside `main` that is no `UserError` keeps its traceback.
    """
    _let_any_text_be_printed()
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(doc or "", config_name, config_dir))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach us instead of being printed by Hydra
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def job(cfg: Any) -> Any:
        try:  # exits at once: Hydra would print all overrides, and secrets in them, before handing an exception on
            with ranks.ending_together(), explaining_full_disk():
                return main(cfg)
        except UserError as error:
            _exit(str(error))
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere shows when it is resolved
            _exit(_explain(error, config_name, config_dir))
        except Exception as error:
            raise _Bug(error) from error

    bug: Exception | None = None
    where: dict[str, Any] = {"config_path": str(config_dir), "config_name": config_name}
    keys: tuple[str, ...] = FREE_TEXT_KEYS
    try:
        alone = OmegaConf.load(config_dir / f"{config_name}.yaml")
        if not _uses_groups(alone):  # where Hydra sees no groups, `vae=` and its like are plain keys
            where = {"config_path": None, "config_name": f"{config_name}_alone"}
            ConfigStore.instance().store(where["config_name"], alone)
            keys = (*FREE_TEXT_KEYS, *PART_KEYS)
        sys.argv[1:] = [quote_free_text(argument, keys) for argument in arguments]
        hydra.main(version_base="1.3", **where)(job)()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except _Bug as carrier:
        bug = carrier.error
    except Exception as error:
        _exit(_explain(error, config_name, config_dir))
    if bug is not None:
        raise bug


class _Bug(BaseException):
    """Carries an exception of ours through Hydra, which lets only what is no `Exception` pass as it is."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _uses_groups(config: Any) -> bool:
    """Tell whether a config is composed of groups of ours, Hydra's own aside."""
    named = [key for entry in config.get("defaults", []) if isinstance(entry, Mapping) for key in entry]
    return any(not str(key).removeprefix("override ").startswith("hydra/") for key in named)


def _let_any_text_be_printed() -> None:
    """Let letters that a terminal or a log's encoding lacks be shown as escapes, rather than end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(message: str) -> NoReturn:
    lines = [printable(line) for line in redacted(message).split("\n")]
    print("error:", "\n".join(lines), file=sys.stderr)
    sys.exit(2)


def _groups(config_dir: Path) -> dict[str, list[str]]:
    folders = sorted(folder for folder in config_dir.iterdir() if folder.is_dir() and folder.name != "hydra")
    return {folder.name: sorted(path.stem for path in folder.glob("[!_]*.yaml")) for folder in folders}


def _help(doc: str, config_name: str, config_dir: Path) -> str:
    lines = [doc.strip(), ""]
    if config_name == "train":
        lines.append("Config groups (GROUP=OPTION):")
        lines += [f"  {group:13} {' | '.join(options)}" for group, options in _groups(config_dir).items()]
    else:
        text = (config_dir / f"{config_name}.yaml").read_text(encoding="utf-8")
        lines.append("Settings (KEY=VALUE), with their defaults:")
        lines += [f"  {line}" for line in text.split("\nhydra:")[0].splitlines() if re.match(r"\w+: ", line)]
    lines += ["", "Print the composed config: --cfg job.  Hydra's own flags: --hydra-help."]
    return "\n".join(lines)


def _explain(error: BaseException | None, config_name: str, config_dir: Path) -> str:
    """Say in one message what Hydra and OmegaConf spread over several exceptions."""
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        reason = str(error).strip().split("\nSee ")[0].removeprefix(f"Error parsing override '{error.override}'\n")
        return f"cannot read '{error.override}' as KEY=VALUE: {reason}"
    chain = []
    while error is not None:
        chain.append(str(error).strip() or type(error).__name__)
        error = error.__cause__
    text = "\n".join(dict.fromkeys(chain))
    groups = _groups(config_dir)
    if found := re.search(r"Could not override '([^']+)'", text):
        from ldm.config import known_keys

        key = found[1].rpartition("@")[2].replace("/", ".")
        full_key = at[1] if (at := re.search(r"full_key: (\S+)", text)) else key
        stated, added = _composed_keys(config_name, config_dir), re.search(r"use \+(\S[^\n]*)", text)
        known = set(known_keys(config_name))
        if added and "@" not in found[1] and (key in known or key in stated or key.startswith("optim.arguments.")):
            sign = "+" if full_key == key else "++"  # a mapping that is there already takes new entries by ++
            return f"'{full_key}' is not stated in the composed config; to add it write {sign}{added[1]}"
        candidates = sorted({*known, *stated, *(groups if config_name == "train" else ())})
        return f"unknown config key '{key}'{nearest(key, candidates)} (--help lists the groups, --cfg job the keys)"
    if found := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = found[1], found[2]
        if group in ("hydra/launcher", "hydra/sweeper"):
            more = "launchers joblib, submitit_local, submitit_slurm and the sweeper optuna"
            return f"there is no {group}={option}; pip install 'ldm[sweeps]' brings the {more}"
        options = groups.get(group, [])
        return f"no option '{option}' in group '{group}'{nearest(option, options) or '.'} It has: {', '.join(options)}"
    return text


def _composed_keys(config_name: str, config_dir: Path) -> list[str]:
    """Return the dotted keys of the config as it is composed without any override."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{key}.")

    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return list(walk(compose(config_name), ""))
