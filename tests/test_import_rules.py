"""The rules that keep the parts apart, read from the syntax trees so that nothing has to be imported.

Each rule is a function from the parsed project to a list of violations "path:line: what". The project must have none;
and each rule is shown a small project that breaks it, so that no rule passes because it sees nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("opd", "rollout", "teachers")
FOLDERS = (*PRODUCT, "conf", "tests", "scripts")

JOINTS = {f"opd/{name}.py" for name in ("crew", "progress", "train", "evaluate", "pipeline", "__main__")}
HOMES = {
    "ray": {"opd/actors.py"},
    "deepspeed": {"opd/engine.py"},
    "wandb": {"opd/metrics.py"},
    "hydra": {"opd/__main__.py"},
    "omegaconf": {"opd/__main__.py", "opd/config.py"},
}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager"}
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
PICKLE_LOADS = {"torch.load", "torch.serialization.load", "torch.jit.load"}


@dataclass(slots=True, kw_only=True, frozen=True)
class Import:
    """`from opd import config` in opd/data.py is Import(target="opd.config", line=..., type_only=False)."""

    target: str  # absolute dotted name; for `from x import y` it is x.y, whether y is a module or not
    line: int
    type_only: bool  # under `if TYPE_CHECKING:`

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


@dataclass(slots=True, kw_only=True, frozen=True)
class Module:
    path: str  # relative to the project, with slashes
    name: str  # dotted
    tree: ast.Module
    imports: tuple[Import, ...]
    aliases: dict[str, str]  # name in the file -> dotted name of what was imported

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def read_project(root: Path) -> list[Module]:
    return [read_module(root, path) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def read_module(root: Path, path: Path) -> Module:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports: list[Import] = []
    aliases: dict[str, str] = {}
    for node, type_only in walk_with_context(tree, False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append(Import(target=alias.name, line=node.lineno, type_only=type_only))
                bound = alias.asname or alias.name.partition(".")[0]
                aliases[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom):
            origin = absolute_origin(node, name, is_package)
            for alias in node.names:
                target = origin if alias.name == "*" else f"{origin}.{alias.name}"
                imports.append(Import(target=target, line=node.lineno, type_only=type_only))
                aliases[alias.asname or alias.name] = target
        elif isinstance(node, ast.Call) and (target := dynamic_target(node)):
            imports.append(Import(target=target, line=node.lineno, type_only=type_only))
    return Module(path=relative.as_posix(), name=name, tree=tree, imports=tuple(imports), aliases=aliases)


def walk_with_context(node: ast.AST, type_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, with whether it stands in the body of an `if TYPE_CHECKING:`."""
    yield node, type_only
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        branches = [(child, True) for child in node.body] + [(child, type_only) for child in node.orelse]
    else:
        branches = [(child, type_only) for child in ast.iter_child_nodes(node)]
    for child, child_type_only in branches:
        yield from walk_with_context(child, child_type_only)


def absolute_origin(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The dotted name that a `from ... import` reads from, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    parents = name.split(".")
    parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def dynamic_target(call: ast.Call) -> str | None:
    """The module that `import_module("x")` or `__import__("x")` names, if it is written out."""
    called = ast.unparse(call.func)
    if called in ("import_module", "importlib.import_module", "__import__") and call.args:
        argument = call.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
    return None


def dotted(node: ast.expr, module: Module) -> str:
    """`t.load` after `import torch as t` is "torch.load"; an expression that is no dotted name is ""."""
    if isinstance(node, ast.Name):
        return module.aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, module)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def product(project: list[Module]) -> list[Module]:
    return [module for module in project if module.package in PRODUCT]


def acting_and_judging_are_apart(project: list[Module]) -> list[str]:
    other = {"rollout": "teachers", "teachers": "rollout"}
    return [
        f"{module.path}:{found.line}: {module.package} imports {found.target}"
        for module in project
        for found in module.imports
        if other.get(module.package) == found.package
    ]


def only_joints_import_acting_or_judging(project: list[Module]) -> list[str]:
    return [
        f"{module.path}:{found.line}: imports {found.target}; only {', '.join(sorted(JOINTS))} may"
        for module in project
        if module.package == "opd" and module.path not in JOINTS
        for found in module.imports
        if found.package in ("rollout", "teachers")
    ]


def product_stands_alone(project: list[Module]) -> list[str]:
    return [
        f"{module.path}:{found.line}: imports {found.target}"
        for module in product(project)
        for found in module.imports
        if found.package in ("tests", "scripts", "conftest") or found.package.startswith("test_")
    ]


def libraries_stay_home(project: list[Module]) -> list[str]:
    return [
        f"{module.path}:{found.line}: imports {found.target}; only {', '.join(sorted(HOMES[found.package]))} may"
        for module in product(project)
        for found in module.imports
        if module.path not in HOMES.get(found.package, {module.path})
    ]


def no_cycles(project: list[Module]) -> list[str]:
    """Imports inside functions count: they only hide a cycle. A package is not taken to import its parent."""
    names = {module.name for module in project}

    def module_of(target: str) -> str | None:
        while target and target not in names:
            target = target.rpartition(".")[0]
        return target or None

    edges = {
        module.name: sorted(
            {
                found_name
                for found in module.imports
                if not found.type_only
                and (found_name := module_of(found.target)) is not None
                and found_name != module.name
            }
        )
        for module in project
    }
    cycles: list[str] = []
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            cycles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in finished:
            for target in edges[name]:
                visit(target, [*trail, name])
            finished.add(name)

    for name in sorted(edges):
        visit(name, [])
    return cycles


def names_say_what(project: list[Module]) -> list[str]:
    return [
        f"{module.path}: the name {part!r} says nothing"
        for module in project
        for part in module.name.split(".")
        if part.lower() in VAGUE_NAMES
    ]


def folders_are_packages(project: list[Module]) -> list[str]:
    """A folder without __init__.py is one that any installed package of the same name could add to or hide."""
    paths = {module.path for module in project}
    return [
        f"{module.path}: its folder has no __init__.py"
        for module in product(project)
        if f"{module.path.rpartition('/')[0]}/__init__.py" not in paths
    ]


def nothing_is_unpickled(project: list[Module]) -> list[str]:
    violations: list[str] = []
    for module in project:
        for found in module.imports:
            if found.package in PICKLERS or found.target in PICKLE_LOADS:
                violations.append(f"{module.path}:{found.line}: imports {found.target}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and dotted(node, module) in PICKLE_LOADS:
                violations.append(f"{module.path}:{node.lineno}: {dotted(node, module)} unpickles")
            if isinstance(node, ast.Call) and is_switched_on(node, "allow_pickle"):
                violations.append(f"{module.path}:{node.lineno}: allow_pickle")
    return violations


def no_remote_code(project: list[Module]) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: trust_remote_code"
        for module in project
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call | ast.Dict) and is_switched_on(node, "trust_remote_code")
    ]


def is_switched_on(node: ast.Call | ast.Dict, flag: str) -> bool:
    """Whether a call or a dict display gives `flag` any value but a literal False."""
    if isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg == flag]
    else:
        pairs = zip(node.keys, node.values, strict=True)
        values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == flag]
    return any(not (isinstance(value, ast.Constant) and value.value is False) for value in values)


def only_the_command_line_prints(project: list[Module]) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: print"
        for module in product(project)
        if module.path != "opd/__main__.py"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


Rule = Callable[[list[Module]], list[str]]
RULES: tuple[Rule, ...] = (
    acting_and_judging_are_apart,
    only_joints_import_acting_or_judging,
    product_stands_alone,
    libraries_stay_home,
    no_cycles,
    names_say_what,
    folders_are_packages,
    nothing_is_unpickled,
    no_remote_code,
    only_the_command_line_prints,
)


@pytest.fixture(scope="module")
def project() -> list[Module]:
    return read_project(ROOT)


def plant(root: Path, files: dict[str, str]) -> list[Module]:
    """A project of these files, with the __init__.py that each folder of the product needs."""
    for path, source in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        if file.parent != root and path.partition("/")[0] in PRODUCT:
            (file.parent / "__init__.py").touch()
    return read_project(root)


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule: Rule, project: list[Module]) -> None:
    assert not rule(project)


def test_the_whole_project_was_read(project: list[Module]) -> None:
    paths = {module.path for module in project}
    assert {"opd/config.py", "rollout/__init__.py", "teachers/__init__.py", "tests/test_import_rules.py"} <= paths
    config = next(module for module in project if module.path == "opd/config.py")
    assert any(found.target == "omegaconf.MISSING" for found in config.imports)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (acting_and_judging_are_apart, "rollout/fleet.py", "import teachers.pool"),
        (acting_and_judging_are_apart, "teachers/pool.py", "def score():\n    from rollout import engine"),
        (only_joints_import_acting_or_judging, "opd/learner.py", "from rollout.fleet import Fleet"),
        (only_joints_import_acting_or_judging, "opd/model/hub.py", "import teachers"),
        (product_stands_alone, "opd/losses.py", "from tests.oracles import slow_kl"),
        (product_stands_alone, "teachers/local.py", "import scripts.benchmarks"),
        (libraries_stay_home, "opd/train.py", "def start():\n    import ray"),
        (libraries_stay_home, "rollout/worker.py", "from ray.util import queue"),
        (libraries_stay_home, "opd/muon.py", "import deepspeed.ops as ops"),
        (libraries_stay_home, "opd/report.py", "import importlib\nimportlib.import_module('wandb')"),
        (libraries_stay_home, "opd/config.py", "import hydra"),
        (libraries_stay_home, "opd/data.py", "from omegaconf import OmegaConf"),
        (no_cycles, "opd/a.py", "from opd import b"),
        (names_say_what, "opd/utils.py", ""),
        (names_say_what, "tests/common/oracles.py", ""),
        (names_say_what, "tests/helpers.py", ""),
        (nothing_is_unpickled, "opd/weights.py", "import pickle"),
        (nothing_is_unpickled, "tests/test_weights.py", "from pickle import loads"),
        (nothing_is_unpickled, "opd/learner.py", "import torch\nstate = torch.load('x', weights_only=False)"),
        (nothing_is_unpickled, "scripts/benchmarks/step.py", "import torch as t\nload = t.load"),
        (nothing_is_unpickled, "opd/learner.py", "from torch import load"),
        (nothing_is_unpickled, "teachers/store.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        (no_remote_code, "opd/model/hub.py", "load('x', trust_remote_code=True)"),
        (no_remote_code, "opd/chat.py", "load('x', trust_remote_code=config.trust)"),
        (no_remote_code, "tests/test_hub.py", "load('x', **{'trust_remote_code': True})"),
        (only_the_command_line_prints, "opd/train.py", "def step():\n    print('loss')"),
        (only_the_command_line_prints, "teachers/__main__.py", "print()"),
    ],
)
def test_a_planted_violation_is_found(rule: Rule, path: str, source: str, tmp_path: Path) -> None:
    files = {path: source}
    if rule is no_cycles:
        files["opd/b.py"] = "def later():\n    import opd.a\n"
    violations = rule(plant(tmp_path, files))
    assert len(violations) == 1, violations
    assert Path(path).stem in violations[0]


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        (only_joints_import_acting_or_judging, {"opd/pipeline.py": "import rollout.fleet, teachers.pool"}),
        (libraries_stay_home, {"opd/actors.py": "import ray", "opd/__main__.py": "import hydra, omegaconf"}),
        (libraries_stay_home, {"tests/test_actors.py": "import ray", "opd/data.py": "import rayleigh"}),
        (nothing_is_unpickled, {"opd/kernels/cpu.py": "from torch.utils.cpp_extension import load\nload('x')"}),
        (nothing_is_unpickled, {"opd/learner.py": "import json\njson.load(open('x'))\nself.torch.loads()"}),
        (no_remote_code, {"opd/model/hub.py": "load('x', trust_remote_code=False)"}),
        (only_the_command_line_prints, {"opd/__main__.py": "print()", "scripts/benchmarks/a.py": "print()"}),
        (names_say_what, {"opd/database.py": "", "tests/test_base_model.py": ""}),
    ],
)
def test_what_is_allowed_is_not_a_violation(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    assert not rule(plant(tmp_path, files))


def test_a_folder_without_init_is_found(tmp_path: Path) -> None:
    project = plant(tmp_path, {"opd/model/hub.py": "", "opd/data.py": ""})
    assert not folders_are_packages(project)
    (tmp_path / "opd/model/__init__.py").unlink()
    assert folders_are_packages(read_project(tmp_path)) == ["opd/model/hub.py: its folder has no __init__.py"]


def test_a_long_cycle_through_a_function_is_named_once(tmp_path: Path) -> None:
    project = plant(
        tmp_path,
        {
            "opd/a.py": "import opd.b",
            "opd/b.py": "from . import c",
            "opd/c.py": "def f():\n    from opd.d import x",
            "opd/d.py": "class D:\n    def g(self):\n        from .a import y",
            "opd/e.py": "import opd.a\nimport opd.c",
        },
    )
    assert no_cycles(project) == ["opd.a -> opd.b -> opd.c -> opd.d -> opd.a"]


def test_an_import_for_types_makes_no_cycle(tmp_path: Path) -> None:
    project = plant(
        tmp_path,
        {
            "opd/a.py": "import opd.b",
            "opd/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from opd.a import A",
            "opd/c.py": "import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    import opd.d",
            "opd/d.py": "import opd.c",
        },
    )
    assert no_cycles(project) == ["opd.c -> opd.d -> opd.c"]


def test_a_package_that_reexports_is_no_cycle_unless_its_module_asks_it(tmp_path: Path) -> None:
    package = tmp_path / "opd/model/__init__.py"
    plant(tmp_path, {"opd/model/layers.py": "import torch"})
    package.write_text("from opd.model.layers import Norm")
    assert not no_cycles(read_project(tmp_path))
    (tmp_path / "opd/model/layers.py").write_text("from opd.model import Norm")
    assert no_cycles(read_project(tmp_path)) == ["opd.model -> opd.model.layers -> opd.model"]
