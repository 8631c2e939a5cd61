"""A command in the interpreter of the tests, with flags that no other test has set."""

import importlib.util
from typing import Any


def fresh_command(name: str, *flags: str) -> Any:
    """The module of a command, its flags parsed; `main([])` runs it."""
    spec = importlib.util.find_spec(f"gidd_jax.{name}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.flags.parse([name, *flags])
    return module
