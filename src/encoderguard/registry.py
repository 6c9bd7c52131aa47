"""Methods by family and name. A method is one file that holds one registered dataclass."""

import ast
import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from encoderguard.errors import SettingError

__all__ = [
    "FAMILIES",
    "Family",
    "Method",
    "create",
    "method_class",
    "method_names",
    "register",
    "setting_docs",
]

Family = Literal["pretrain", "attack", "detector", "defense", "filter"]
FAMILIES: dict[Family, str] = {
    "pretrain": "encoderguard.pretrain",
    "attack": "encoderguard.attacks",
    "detector": "encoderguard.detectors",
    "defense": "encoderguard.defenses",
    "filter": "encoderguard.filters",
}
_METHODS: dict[tuple[Family, str], type["Method"]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A frozen dataclass whose fields are the method's settings; they are checked when it is made."""

    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    """Of the paper; 0 for a method of our own."""
    needs: ClassVar[str] = ""
    """What the caller must bring: clean images, a training set, a downstream head."""
    cost: ClassVar[str] = ""
    """Class of cost, in words: forward passes only, a search, a fine-tuning, a training."""
    blind_spots: ClassVar[str] = ""
    """What the method does not cover, in one sentence."""
    spreads: ClassVar[bool] = False
    """Whether several devices may share each training step: its losses are then those of one device."""

    def __post_init__(self) -> None:
        """Check every setting against its annotation, so that Python and the command line agree."""
        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            object.__setattr__(self, name, _coerce(type(self), name, adapter, value))

    def settings(self) -> dict[str, Any]:
        """The settings in effect, as JSON values."""
        adapters = _adapters(type(self))
        return {
            name: adapter.dump_python(getattr(self, name), mode="json") for name, adapter in adapters.items()
        }


_FINITE = ConfigDict(allow_inf_nan=False)
MethodT = TypeVar("MethodT", bound=type[Method])


def register(cls: MethodT) -> MethodT:
    """Class decorator: make a method known under its family and name."""
    key = (cls.family, cls.name)
    if _METHODS.get(key, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"Two methods are named {key}: {_METHODS[key]} and {cls}.")
    _METHODS[key] = cls
    return cls


def _discover(family: Family) -> None:
    package = importlib.import_module(FAMILIES[family])
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")


def method_names(family: Family) -> list[str]:
    """The registered names of a family, sorted."""
    _discover(family)
    return sorted(name for known, name in _METHODS if known == family)


def method_class(family: Family, name: str) -> type[Method]:
    """The class of a method.

    Raises:
        SettingError: no such family or name; the message lists the known ones.
    """
    if family not in FAMILIES:
        raise SettingError(f"Unknown family '{family}'; expected one of {', '.join(FAMILIES)}.")
    known = method_names(family)
    if name not in known:
        raise SettingError(f"Unknown {family} '{name}'; expected one of: {', '.join(known)}.")
    return _METHODS[(family, name)]


def create(family: Family, name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """A method with ``settings`` (strings are parsed as on the command line).

    Raises:
        SettingError: unknown method, unknown setting, or a value that its annotation refuses.
    """
    cls = method_class(family, name)
    adapters = _adapters(cls)
    given = dict(settings or {})
    unknown = sorted(set(given) - set(adapters))
    if unknown:
        raise SettingError(
            f"Unknown setting '{unknown[0]}' of {family} '{name}'; "
            f"expected one of: {', '.join(sorted(adapters))}."
        )
    return cls(**{key: _parse(cls, key, adapters[key], value) for key, value in given.items()})


def _adapters(cls: type[Method]) -> dict[str, TypeAdapter[Any]]:
    cached: dict[str, TypeAdapter[Any]] | None = cls.__dict__.get("_adapter_cache")
    if cached is None:
        hints = get_type_hints(cls, include_extras=True)
        cached = {
            field.name: TypeAdapter(hints[field.name], config=_FINITE) for field in dataclasses.fields(cls)
        }
        cls._adapter_cache = cached  # type: ignore[attr-defined]
    return cached


def _parse(cls: type[Method], name: str, adapter: TypeAdapter[Any], value: Any) -> Any:
    if isinstance(value, str):
        try:
            return adapter.validate_python(value)
        except ValidationError:
            # lists and tuples come as Python or JSON writes them: -p sizes=[3,5]
            with contextlib.suppress(ValidationError, ValueError, SyntaxError):
                return adapter.validate_python(ast.literal_eval(value))
    return _coerce(cls, name, adapter, value)


def _coerce(cls: type[Method], name: str, adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        reason = message[0].lower() + message[1:]
        raise SettingError(
            f"Setting '{name}' of {cls.family} '{cls.name}' cannot be {value!r}: {reason}."
        ) from None


def setting_docs(cls: type[Method]) -> list[dict[str, Any]]:
    """Name, type, default and docstring of each setting, inherited ones too, for ``list`` and the docs."""
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for parent in reversed([kind for kind in cls.__mro__ if issubclass(kind, Method)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value)) if is_doc else ""  # type: ignore[attr-defined]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    types = {field.name: _type_name(field.type) for field in dataclasses.fields(cls)}
    return [
        {"name": name, "type": types[name], "default": default, "doc": docs.get(name, "")}
        for name, default in defaults.items()
    ]


def _type_name(hint: Any) -> str:
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
