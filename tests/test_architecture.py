"""The direction of imports, honest public names, and no way for a pickle to run.

A new module is added to LAYERS at the height where it belongs: above everything that it imports.
"""

import ast
import graphlib
import importlib

import pytest

from tests.source_rules import FILES, PACKAGE, TREES, RunTime, imports, public_names, sort_key, unsafe_loading

# From low to high. A module imports only from lower layers, or from modules named before it in its own layer.
# A name is a module or a whole package; inside one package the modules may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("random", "storage", "provenance", "peers"),
    ("registry", "run", "progress", "relay", "parallel"),
    ("image_decoding", "image_storage", "image_named", "image_sources", "image_view", "images"),
    ("triggers",),
    ("backbones", "recipes", "architectures", "bundles", "modules", "encoder"),
    ("methods",),
    ("patch_places", "poisoning", "pair_layouts"),
    ("sanity", "checkpoints", "loading"),
    ("hooks", "features", "augment", "disturbance", "captions", "calibration", "nulls"),
    ("losses", "similarity", "mine", "information"),
    ("plans", "training", "planting_terms", "planting", "hidden", "pruning", "repair", "clusters", "tuning"),
    (
        "folding",
        "penalty",
        "parametrisations",
        "inversion",
        "cluster_search",
        "refinement",
        "rays",
        "bank",
        "collapse",
        "search",
    ),
    ("generators", "mixing", "recovery", "unlearning", "feature_heads", "smallest"),
    ("classifiers", "monitoring", "probes", "references", "fidelity", "evaluation"),
    ("attacks", "defenses", "detectors", "filters", "pretrain"),
    ("results",),
    ("report",),
    ("jobs",),
    ("zoo",),
    ("story", "demo", "bench"),
    ("cli", "__main__"),
    ("__init__",),  # the public API of the whole package
)
# Packages of methods: any of them can be removed without the others noticing.
FAMILIES = frozenset({"attacks", "defenses", "detectors", "filters", "pretrain"})
# A report is made from a record, also on a machine without torch.
TORCH_FREE = ("report",)
TORCH_LIBRARIES = frozenset({"kornia", "lightly", "lightning_fabric", "timm", "torch", "torchvision"})
ADD_TO_TABLE = (
    "not in the layer table. Add the name to LAYERS in tests/test_architecture.py, "
    "above everything that it imports and below everything that imports it."
)
HEIGHT = {name: (height, place) for height, layer in enumerate(LAYERS) for place, name in enumerate(layer)}


def part(module: str) -> str:
    """The entry of LAYERS that a module falls under: `encoderguard.report.page` -> `report`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def project_imports(module: str, tree: ast.AST) -> list[tuple[int, str]]:
    is_package = FILES[module].name == "__init__.py"
    return list(imports(tree, module, is_package=is_package, known=frozenset(FILES)))


def layer_problem(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported` (both entries of LAYERS), or None."""
    if importer == imported:
        return None
    if importer in FAMILIES and imported in FAMILIES:
        return "method families never import each other; move what they share to a lower module"
    if unknown := {importer, imported} - set(HEIGHT):
        return f"not in LAYERS: {', '.join(sorted(unknown))}"
    if HEIGHT[imported] >= HEIGHT[importer]:
        return f"'{imported}' is higher in LAYERS than '{importer}'; imports go down only"
    return None


def torch_imports(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    found = imports(tree, module, is_package=False, known=frozenset())
    return [(line, name) for line, name in found if name.split(".")[0] in TORCH_LIBRARIES]


def test_every_module_has_its_layer() -> None:
    unknown = sorted({part(module) for module in FILES} - set(HEIGHT))
    assert not unknown, f"{', '.join(unknown)}: {ADD_TO_TABLE}"


def test_imports_flow_down() -> None:
    problems = [
        f"{module}, line {line}, imports {name}: {problem}"
        for module in FILES
        for line, name in dict.fromkeys(project_imports(module, TREES[module]))
        if name.split(".")[0] == PACKAGE and (problem := layer_problem(part(module), part(name)))
    ]
    assert not problems, "\n".join(problems)


def test_no_two_modules_need_each_other() -> None:
    graph = {}
    for module, path in FILES.items():
        tree = RunTime().visit(ast.parse(path.read_text(encoding="utf-8")))
        graph[module] = {name for _, name in project_imports(module, tree) if name in FILES} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("These modules import each other in a circle: " + " -> ".join(error.args[1]))


def test_reports_are_made_without_torch() -> None:
    problems = [
        f"{module}, line {line}, imports {name}: a report is made from the record alone"
        for module, tree in TREES.items()
        if part(module) in TORCH_FREE
        for line, name in torch_imports(tree, module)
    ]
    assert not problems, "\n".join(problems)


def test_nothing_can_execute_a_file() -> None:
    problems = [
        f"{module}, line {line}: {problem}"
        for module, tree in TREES.items()
        for line, problem in unsafe_loading(tree)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("module", [name for name, tree in TREES.items() if public_names(tree) is not None])
def test_public_names_exist_and_are_sorted(module: str) -> None:
    names = public_names(TREES[module]) or []
    missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
    assert not missing, f"__all__ of {module} promises {', '.join(missing)}, which it does not have"
    assert len(set(names)) == len(names), f"__all__ of {module} names something twice"
    assert names == sorted(names, key=sort_key), f"sort __all__ of {module}: ruff check --fix does it"


# The rules themselves, on sources small enough to check by eye.


@pytest.mark.parametrize(
    ("importer", "imported", "reason"),
    [
        ("detectors", "inversion", None),
        ("detectors", "detectors", None),
        ("encoder", "backbones", None),
        ("backbones", "encoder", "imports go down only"),
        ("inversion", "detectors", "imports go down only"),
        ("defenses", "attacks", "families never import each other"),
        ("attacks", "defenses", "families never import each other"),
        ("cli", "__init__", "imports go down only"),
        ("__init__", "cli", None),
        ("detectors", "news", "not in LAYERS: news"),
    ],
)
def test_layer_rule(importer: str, imported: str, reason: str | None) -> None:
    problem = layer_problem(importer, imported)
    assert problem is None if reason is None else reason in str(problem)


def test_imports_are_seen_at_any_depth_and_in_any_spelling() -> None:
    source = """
import torch.nn
from encoderguard import errors
from . import sibling
from ..losses import cosine
def f():
    from encoderguard.detectors.decree import Decree
"""
    known = frozenset({"encoderguard.errors", "encoderguard.attacks.sibling"})
    found = imports(ast.parse(source), "encoderguard.attacks.new", is_package=False, known=known)
    assert sorted(found) == [
        (2, "torch.nn"),
        (3, "encoderguard.errors"),
        (4, "encoderguard.attacks.sibling"),
        (5, "encoderguard.losses"),
        (7, "encoderguard.detectors.decree"),
    ]


def test_imports_for_the_type_checker_alone_are_not_needed_at_run_time() -> None:
    tree = RunTime().visit(ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b\nimport c"))
    found = imports(tree, "encoderguard.new", is_package=False, known=frozenset())
    assert {name for _, name in found} == {"b", "c"}


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    tree = ast.parse("from .page import render")
    assert list(imports(tree, "encoderguard.report", is_package=True, known=frozenset())) == [
        (1, "encoderguard.report.page")
    ]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch.load(path, weights_only=True)", 0),
        ("import torch\ntorch.load(path)", 1),
        ("import torch\ntorch.load(path, weights_only=False)", 1),
        ("import torch as t\nt.jit.load(path)", 1),
        ("from torch import load\nload(path)", 1),
        ("from torch.hub import load_state_dict_from_url as get\nget(url)", 1),
        ("import json\njson.load(stream)", 0),
        ("import numpy as np\nnp.load(path, allow_pickle=False)", 0),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", 1),
        ("def f():\n    import pickle", 1),
        ("from joblib import load", 1),
    ],
)
def test_unsafe_loading_rule(source: str, count: int) -> None:
    assert len(list(unsafe_loading(ast.parse(source)))) == count


def test_torch_rule_sees_its_libraries() -> None:
    tree = ast.parse("import numpy\nimport torch.nn as nn\nfrom timm import create_model")
    assert torch_imports(tree, "encoderguard.report.page") == [(2, "torch.nn"), (3, "timm")]


def test_sort_key_is_ruffs_order() -> None:
    order = ["FAMILIES", "StopSignal", "Stopped", "Zoo", "apply", "resnet2", "resnet10"]
    assert sorted(reversed(order), key=sort_key) == order
