"""The flags of commands that read a model: which one, in which dtype, whose code may run."""

from typing import Any, NamedTuple

from absl import flags

from gidd_jax.cli import CommandFlags

DTYPES = ("float32", "bfloat16")  # that a model is computed in


def checkpoint_flag(command: CommandFlags) -> flags.FlagHolder[str]:
    """Define `--checkpoint`, the model of a command that needs one."""
    return command.DEFINE_string(
        "checkpoint",
        None,
        "A run, one of its checkpoints, a Hugging Face folder or owner/name, a checkpoint of the "
        "original, or `embedded`, the small model that comes with the package.",
        required=True,
    )


def dtype_flag(command: CommandFlags) -> flags.FlagHolder[str | None]:
    """Define `--dtype`, in which a model is read."""
    return command.DEFINE_enum(
        "dtype",
        None,
        list(DTYPES),
        "Of parameters and products. Default: float32, of runs as they were trained.",
    )


class CodeFlags(NamedTuple):
    """The flags of a command that reads models, whose process may be code of its own."""

    allow_code: flags.FlagHolder[bool]
    process: flags.FlagHolder[str | None]

    @property
    def values(self) -> dict[str, Any]:
        """The keywords of `Gidd.from_pretrained` and of all that reads models."""
        return {"allow_code": self.allow_code.value, "process": self.process.value}


def code_flags(command: CommandFlags, process_help: str = "") -> CodeFlags:
    """Define `--allow_code` and `--process`; `process_help` says what else the latter means."""
    return CodeFlags(
        command.DEFINE_bool(
            "allow_code",
            False,
            "Run the process code that is recorded in the checkpoint. It is not part of this "
            "package: read it first.",
        ),
        command.DEFINE_string(
            "process",
            None,
            process_help or "FILE.py:CLASS to run in place of the code recorded in the checkpoint.",
        ),
    )
