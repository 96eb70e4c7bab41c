"""The house's layers: imports point down, heavy libraries stay in their rooms, files stay short."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_steel"
LAYER = {
    "errors": 0, "recipe": 0, "recipe_checks": 0, "dist": 0, "signals": 0,
    "data": 1, "model": 1, "checkpoint": 1,
    "train": 2, "convert": 2, "post": 2,
    "planner": 3, "audit": 3, "audit_probe": 3, "audit_replay": 3, "audit_figures": 3, "audit_picture": 3, "preflight": 3, "stages": 3, "jobs": 3,
    "device": 3, "catalogue": 3, "scale": 3, "run_folder": 3, "nodes_agree": 3, "inspect_run": 3, "rehearsal": 3,
    "run_report": 3, "pretrain": 4, "tune": 4, "supervise": 4, "hosts": 4, "node": 4, "verbs": 4, "cli": 4,
}  # fmt: skip
BLIND = {1: {"data", "model", "checkpoint"}, 2: {"train", "convert", "post"}}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
DEEPSPEED_MAY_BE_IN = ("train/", "checkpoint/zero.py")
SHIPPED = {"modeling_steel.py", "mixture_steel.py", "experts_steel.py", "configuration_steel.py", "modeling_nanogpt.py",
           "configuration_nanogpt.py", "modeling_openelm.py", "configuration_openelm.py"}  # fmt: skip


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports when it runs, also inside functions; type hints do not count."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _rooms_used(path: Path) -> set[str]:
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith("megatron_steel.")}
    return ours - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = _room(path)
    for used in _rooms_used(path) - {room}:
        assert LAYER[used] <= LAYER[room], f"{room} must not know {used}"
        if LAYER[used] == LAYER[room] and LAYER[room] in BLIND:
            pytest.fail(f"{room} and {used} are blind to each other")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_the_rules_of_its_room(path):
    relative = str(path.relative_to(PACKAGE))
    text = path.read_text(encoding="utf-8")
    if any(name.split(".")[0] == "deepspeed" for name in _imports(path)):
        assert relative.startswith(DEEPSPEED_MAY_BE_IN), "deepspeed is not imported here"
    if path.name in SHIPPED:
        assert not _rooms_used(path), "the shipped files import nothing of ours"
    if relative != "dist.py":
        assert not {"LOCAL_RANK", "WORLD_SIZE", "RANK"} & {
            node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)
        }, "rank variables are read in dist.py alone"
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), "a module opens with its job"


def test_every_shipped_file_belongs_to_a_class():
    from megatron_steel.model.own import OWN

    assert {file.name for own in OWN.values() for file in own.files} == SHIPPED


def test_only_one_file_knows_the_byte_format():
    assert [p.name for p in FILES if "MMIDIDX" in p.read_text(encoding="utf-8")] == ["indexed.py"]


def test_every_package_is_packed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    packed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert packed == found | {"megatron_steel.ds_configs"}


def test_no_two_test_files_share_a_name():
    """pytest imports them by their name alone, and would leave the second one out of the run."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
