"""Refuses a method that another command runs, before arguments that it does not take are asked for."""

import typer

__all__ = ["fine_tuning", "poisoning"]


def fine_tuning(name: str) -> str:
    """``name``; raises BadParameter for an attack that poisons data."""
    return _of_kind(name, "EncoderAttack", "poisons a training set", f"poison {name} --images SET --target N")


def poisoning(name: str) -> str:
    """``name``; raises BadParameter for an attack that fine-tunes an encoder."""
    return _of_kind(name, "DataPoisoning", "fine-tunes an encoder", f"attack {name} ENCODER")


def _of_kind(name: str, kind: str, does: str, instead: str) -> str:
    from encoderguard import methods
    from encoderguard.registry import method_class, method_names

    if name in method_names("attack") and not issubclass(
        method_class("attack", name), getattr(methods, kind)
    ):
        raise typer.BadParameter(f"{name} {does}, use 'encoderguard {instead}'")
    return name
