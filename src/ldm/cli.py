"""The door of every root script: free text as typed by a person, fast `--help`, and errors for people.

Hydra's command line is a grammar in which commas, quotes, parentheses, `${` and every non-ASCII letter mean something.
Values of free-text keys (prompts, paths) are therefore quoted before Hydra reads them.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ldm.errors import UserError

CONF_DIR = Path(__file__).parents[2] / "conf"
FREE_TEXT_KEYS = ("prompt", "negative_prompt", "prompt_file", "ckpt", "out", "name", "output_dir", "data.path")


def quote_free_text(argument: str, keys: Iterable[str] = FREE_TEXT_KEYS) -> str:
    r"""Quote the value of `key=value` for Hydra when `key` holds free text.

    Everything after the first `=` is the text. A value already in a pair of quotes, and an empty one, are left alone.

    >>> quote_free_text("prompt=a red circle, (small) on ${blue}")
    "prompt='a red circle, (small) on \\${blue}'"
    >>> quote_free_text("steps=20")
    'steps=20'
    """
    key, equals, text = argument.partition("=")
    if not equals or not text or key.lstrip("+") not in keys:
        return argument
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return argument
    from hydra.core.override_parser.types import Quote, QuotedString

    # OmegaConf reads `${` as an interpolation unless an odd number of backslashes stands before it.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the candidate nearest to a misspelt word, or an empty string."""
    candidates = list(candidates)
    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not found:  # a key may be right but stand at the wrong level: compare last parts
        last_parts = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        found = [last_parts[m] for m in difflib.get_close_matches(word.rpartition(".")[2], last_parts, n=1, cutoff=0.6)]
    return f"; did you mean '{found[0]}'?" if found else ""


def run(main: Callable[[Any], Any], config_name: str, doc: str | None, config_dir: Path = CONF_DIR) -> None:
    """Compose `conf/<config_name>.yaml` with the command line by Hydra and call `main(cfg)`.

    Exits with code 2 and one clear message on bad input, 130 on Ctrl-C.
    """
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(doc or "", config_name, config_dir))
        return
    sys.argv[1:] = [quote_free_text(argument) for argument in arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach us instead of being printed by Hydra
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(main)()
    except UserError as error:
        _exit(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            _exit(str(error.__cause__))
        if not _about_the_config(error):
            raise
        _exit(_explain(error, config_name, config_dir))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


def _exit(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _about_the_config(error: Exception) -> bool:
    """Tell a fault in the composed config from one inside the program, which deserves its traceback."""
    from hydra.errors import InstantiationException

    return not isinstance(error, InstantiationException)


def _groups(config_dir: Path) -> dict[str, list[str]]:
    folders = sorted(folder for folder in config_dir.iterdir() if folder.is_dir() and folder.name != "hydra")
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


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


def _explain(error: Exception, config_name: str, config_dir: Path) -> str:
    """Say in one message what Hydra and OmegaConf spread over several exceptions."""
    message = str(error).strip()
    chain = [message]
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
        chain.append(str(error).strip())
    text = "\n".join(dict.fromkeys(chain))

    from ldm.config import known_keys

    groups = _groups(config_dir)
    candidates = [*known_keys(config_name), *(groups if config_name == "train" else ())]
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1].partition("@")[0].replace("/", ".")
        return f"unknown config key '{key}'{nearest(key, candidates)} (--help lists the groups, --cfg job the keys)"
    if found := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, option = found[1], found[2]
        options = groups.get(group, [])
        return f"no option '{option}' in group '{group}'{nearest(option, options)} It has: {', '.join(options)}"
    if found := re.search(r"Missing mandatory value: (\S+)|Mandatory value missing.*?full_key: (\S+)", text, re.DOTALL):
        return f"the value of '{found[1] or found[2]}' is missing: give it as {found[1] or found[2]}=…"
    return text
