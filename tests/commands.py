"""Commands as modules, their flags kept apart: several commands share names such as --out."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from absl.flags import FLAGS, Flag


def _take_away() -> list[tuple[str, Flag]]:
    ours = [
        (module, flag)
        for module, defined in FLAGS.flags_by_module_dict().items()
        if module.startswith("gidd_jax.")
        for flag in defined
    ]
    for _, flag in ours:
        delattr(FLAGS, flag.name)
    return ours


def _put_back(flags: list[tuple[str, Flag]]) -> None:
    for module, flag in flags:
        FLAGS[flag.name] = flag
        FLAGS.register_flag_by_module(module, flag)


@contextlib.contextmanager
def only_flags(flags: list[tuple[str, Flag]]) -> Iterator[None]:
    """For the time of the block these are all flags of commands that there are."""
    others = _take_away()
    _put_back(flags)
    try:
        yield
    finally:
        _take_away()
        _put_back(others)


def import_command(name: str) -> tuple[ModuleType, list[tuple[str, Flag]]]:
    """Return the module of a command, and its flags for `only_flags`."""
    others = _take_away()
    try:
        return importlib.import_module(name), _take_away()
    finally:
        _put_back(others)
