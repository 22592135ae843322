"""Who may import whom, read from the source: nothing is imported to find out."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ldm"
FILES = sorted(SOURCE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))

# A package or module of ldm, and what of ldm it may import. `errors` (one exception) is open to all but mathematics.
MAY_IMPORT: dict[str, set[str]] = {
    "nn": set(),
    "diffusion": set(),
    "errors": set(),
    "": {"pipeline"},  # ldm/__init__.py, on demand
    "cli": {"config", "ranks", "redact"},
    "config": {"cli", "files"},
    "conditioner": {"nn"},
    "files": set(),
    "weights": {"", "config", "files", "nn", "diffusion"},
    "data": {"config", "files", "nn", "conditioner", "progress", "plugins", "ranks", "redact"},
    "gallery": {"data", "files", "redact"},
    "canvas": {"data"},
    "codec": {"nn"},
    "options": {"diffusion", "scheduler"},
    "scheduler": {"diffusion"},
    "plugins": set(),
    "progress": set(),
    "ranks": set(),
    "redact": set(),
    "pipeline": {"nn", "diffusion", "conditioner", "weights", "data", "canvas", "codec", "options", "scheduler"},
    "sampling": {"", "config", "files", "weights", "data", "gallery", "options", "pipeline", "progress", "redact"},
    "report": {"files"},
    "plan": {"cli", "nn", "training", "weights"},
    "profile": {"cli", "config", "training"},
    "sweep": {"config", "files", "report"},
    "evaluation": {"config", "files", "progress", "redact", "report", "weights", "data", "gallery", "pipeline"},
    "training": {
        "cli",
        "config",
        "files",
        "plugins",
        "ranks",
        "redact",
        "nn",
        "diffusion",
        "conditioner",
        "weights",
        "data",
        "gallery",
        "pipeline",
        "progress",
        "evaluation",
        "report",
        "sweep",
    },
}
# Where hydra may build objects: what a user plugs in. Never where a file of somebody else's is read.
PLUG_IN_FILES = {"plugins.py", "training/optim.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Give each module that a file imports, with whether that is done while it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node not in deferred) for name in names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part_of(path: Path) -> str:
    """Return the package or module of ldm that a file belongs to: `nn`, `pipeline`; "" is ldm/__init__.py."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_parts(path: Path) -> Iterator[tuple[str, bool]]:
    for name, at_once in imports(path):
        if name == "ldm" or name.startswith("ldm."):
            part = [*name.split("."), ""][1]
            yield (part if part in MAY_IMPORT else ""), at_once


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_rules_name_every_part():
    assert {part_of(path) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part} | ({"errors"} if part not in ("nn", "diffusion") else set())
    assert {found for found, _ in imported_parts(path)} <= allowed


def test_no_import_leads_back_to_itself():
    """Neither from file to file nor from part to part, of the imports made at once (not inside functions)."""
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    files: dict[Path, set[Path]] = {}
    parts: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    for path in FILES:
        names = [name for name, at_once in imports(path) if at_once]
        found = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names}
        files[path] = {other for other in found if other is not None}
        parts[part_of(path)] |= {part for part, at_once in imported_parts(path) if at_once} - {part_of(path)}
    for graph in (files, parts):
        TopologicalSorter(graph).prepare()  # raises CycleError, naming the way


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=name_of)
def test_diffusers_is_never_imported(path):
    assert not [name for name, _ in imports(path) if name.split(".")[0] == "diffusers"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_networks_and_mathematics_know_no_framework(path):
    if part_of(path) in ("nn", "diffusion"):
        used = {name.split(".")[0] for name, _ in imports(path)}
        assert not used & {"pytorch_lightning", "hydra", "omegaconf", "transformers", "datasets", "pydantic", "PIL"}


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=name_of)
def test_objects_are_built_from_paths_only_where_users_plug_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named |= {name.rpartition(".")[2] for name, _ in imports(path)}
    building = named & {"instantiate", "get_class", "get_method", "get_object", "import_module", "__import__", "pydoc"}
    if str(path.relative_to(SOURCE) if path in FILES else path.name) not in PLUG_IN_FILES:
        assert not building


def calls_builtin(tree: ast.AST, name: str) -> bool:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(func, ast.Name) and func.id == name for func in calls)


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=name_of)
def test_pickles_are_read_as_data_and_it_is_said(path):
    """Every torch.load says weights_only=True; pickle and exec are not used at all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for name, _ in imports(path)} & {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
    }
    assert not calls_builtin(tree, "exec") and not calls_builtin(tree, "eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_thin(path):
    """And import nothing heavy before it is needed: `--help` comes at once."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    heavy = {name.split(".")[0] for name, at_once in imports(path) if at_once} - {"typing", "ldm", "sys", "pathlib"}
    assert not heavy
