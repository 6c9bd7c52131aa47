"""What the architecture tests ask of source files, read as syntax trees; nothing is imported or run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "encoderguard"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# Modules whose loading functions execute what they read.
PICKLERS = frozenset({"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})


def source_files() -> dict[str, Path]:
    """Dotted module name to file; a package stands under its own name."""
    files = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(
    tree: ast.AST, module: str, *, is_package: bool, known: frozenset[str]
) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, at any depth; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


class RunTime(ast.NodeTransformer):
    """Takes out what stands under `if TYPE_CHECKING:`, which is never executed."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if dotted(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def dotted(node: ast.expr) -> str:
    """`torch.jit.load` for the expression of that name, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{left}.{node.attr}" if (left := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name to full name of everything imported: `np` -> `numpy`, `load` -> `torch.load`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe_loading(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of everything that could execute a file's content."""
    for line, name in imports(tree, PACKAGE, is_package=True, known=frozenset()):
        if name.split(".")[0] in PICKLERS:
            yield line, f"imports {name}"
    known = aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = dotted(node.func).partition(".")
        full = ".".join(filter(None, (known.get(first, first), rest)))
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        loads = full.split(".")[0] == "torch" and full.split(".")[-1] in {"load", "load_state_dict_from_url"}
        if loads and not is_constant(options.get("weights_only"), True):
            yield node.lineno, f"{full}() without weights_only=True"
        if "allow_pickle" in options and not is_constant(options["allow_pickle"], False):
            yield node.lineno, "allow_pickle is not False"


def public_names(tree: ast.Module) -> list[str] | None:
    """The literal `__all__` of a module, or None where it has none."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign)
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions; numbers by value. The order that ruff's RUF022 asks for."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, re.sub(r"\d+", lambda digits: digits[0].zfill(9), name)
