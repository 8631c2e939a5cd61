"""What every command shares: one-line errors, `--help`, and the `--config` flag.

Imports neither jax nor anything heavy, so that `--help` answers at once.
"""

import contextlib
import difflib
import functools
import importlib.util
import io
import logging as log
import os
import re
import select
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gidd_jax.compiled import keep_compiled_programs
from gidd_jax.errors import InputError, RunError

_CONFIG_FLAG = "config"
_WRITTEN = "\n\t\u200c\u200d"  # with the joiners of Persian, Hindi and emoji
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, directions of writing, halves of characters


class CommandFlags:
    """The flags of one command, apart from those of others: several can be imported together.

    `DEFINE_string` and so on are absl's functions of these names, for this command alone. `values`
    holds its flags; `default_config` is the config of a command that names none, `names_config`
    whether this one names one, or a key of it.
    """

    def __init__(self) -> None:
        self.values = flags.FlagValues()
        self.default_config: str | None = None
        self.names_config = False
        if TYPE_CHECKING:  # their overloads
            self.DEFINE_bool = flags.DEFINE_bool
            self.DEFINE_enum = flags.DEFINE_enum
            self.DEFINE_flag = flags.DEFINE_flag
            self.DEFINE_float = flags.DEFINE_float
            self.DEFINE_integer = flags.DEFINE_integer
            self.DEFINE_list = flags.DEFINE_list
            self.DEFINE_multi_string = flags.DEFINE_multi_string
            self.DEFINE_string = flags.DEFINE_string

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("DEFINE_"):
                raise AttributeError(name)
            return functools.partial(getattr(flags, name), flag_values=self.values)

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Take the values from argv, those of absl's own flags too; return the other arguments."""
        for name in flags.FLAGS:
            flag = flags.FLAGS[name]
            if name == flag.name and name not in self.values:
                self.values[name] = flag
        rest = self.values(argv)
        settle_absl_flags()  # which share their values with these
        return rest


def nearest(word: str, legal: Iterable[str]) -> str:
    """Return the end of an error message: the legal word closest to `word`, else all of them."""
    legal = sorted(legal)
    close = difflib.get_close_matches(word, legal, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(legal)}"


def printable(text: str) -> str:
    """Return the text with what a terminal would obey, such as escape codes, written out: `\\x1b`.

    Line breaks and tabs stay, and so do the joiners that some scripts are spelled with.
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in _WRITTEN and unicodedata.category(c) in _OBEYED
        else c
        for c in text
    )


def config_folder() -> Path:
    """Return the folder of the shipped configs: inside a wheel, or beside an editable package."""
    package = Path(str(resources.files("gidd_jax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the files of the shipped configs by name: `gidd`, `sweeps/ablation`."""
    folder = config_folder()
    files = sorted(folder.rglob("*.py"), key=lambda file: (file.parent, file.stem))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_config(name: str) -> Path:
    """Return the file that `name` (a path, `configs/gidd.py`, `gidd` or `ablation`) stands for.

    An existing path wins; names of shipped configs, of sweeps also without their folder, and
    `configs/NAME.py` are found from anywhere. Raises InputError that lists the shipped names.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    shipped = shipped_configs()
    if path.suffix in ("", ".py"):
        wanted = path.with_suffix("").as_posix().removeprefix("configs/")
        for known, file in shipped.items():
            if wanted in (known, known.removeprefix("sweeps/")):
                return file
    raise InputError(
        f"--config={name}: no such file, and the shipped configs are {', '.join(shipped)}"
    )


def load_config(name: str) -> ConfigDict:
    """Return `get_config()` of a config file or shipped config; `name:argument` passes an argument.

    Raises InputError when there is no such config or it takes no such argument.
    """
    name, *argument = name.split(":", 1)
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"gidd_jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config={path}: the file must define get_config()")
    if argument and not module.get_config.__code__.co_argcount:
        raise InputError(f"--config={name}:{argument[0]}: this config takes no argument")
    return module.get_config(*argument)


def settle_absl_flags() -> None:
    """Let libraries read absl's own flags, also in an interpreter that runs no command."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def config_flag(command: CommandFlags, default: str | None = None) -> flags.FlagHolder[Any]:
    """Define `--config` (a file or a shipped name) with `--config.section.key=value` overrides."""
    command.default_config = default
    names = ", ".join(shipped_configs())
    return config_flags.DEFINE_config_file(
        _CONFIG_FLAG,
        help_string=f"Config file, or a shipped config by name ({names}), with NAME:ARGUMENT for "
        "those that take one. Override a key with --config.section.key=value."
        + (f" Default: {default}." if default else ""),
        flag_values=command.values,
    )


def run(
    main: Callable[[list[str]], None],
    command: CommandFlags | None = None,
    *,
    examples: str = "",
    resumes: bool = False,
) -> NoReturn:
    """Parse the flags and call `main(argv)`; bad input ends in one line on stderr and exit code 2.

    `--help` shows the docstring of main's module, `examples` and the command's flags. Without flags
    of its own all other arguments are left to main. Ctrl-C ends in one line and exit code 130;
    `resumes`: the same command continues where it was.
    """

    for stream in (sys.stdout, sys.stderr):
        # Whatever the terminal's encoding: texts have characters that it may lack.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def guarded(argv: list[str]) -> None:
        _quieten_libraries()
        values = command.values if command else {}
        keep_compiled_programs("distributed" in values and bool(values["distributed"].value))
        try:
            with _reader_may_leave():
                main(argv)
        except InputError as error:
            _fail(str(error))
        except RunError as error:
            _fail(str(error), code=1)
        except OSError as error:  # a full disk, a folder without permission: no bug of ours
            if error.errno is None:
                raise
            _fail(str(error), code=1)
        except KeyboardInterrupt:
            if sys.stderr.isatty():  # it shows ^C, and maybe half a progress bar
                print(file=sys.stderr)
            again = "continues from what is done" if resumes else "starts again"
            _fail(f"interrupted; no file is half-written: the same command {again}", code=130)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, main, command, examples))
    raise AssertionError("absl's run always exits")


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End with exit code 1 and no message once nobody reads stdout, as after `| head`."""
    stdout = 1
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(stdout, 0)
        if not poll.poll(0):  # the pipe is another, such as that of a worker
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # for what Python writes when it ends
        sys.exit(1)


def _quieten_libraries() -> None:
    """Leave INFO lines to this package: Orbax alone writes fifty for each checkpoint."""
    package = str(resources.files("gidd_jax"))

    def ours(record: log.LogRecord) -> bool:
        return record.levelno > log.INFO or record.pathname.startswith(package)

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.addFilter(ours)
    handler.setFormatter(log.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))


def _fail(message: str, code: int = 2) -> NoReturn:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


def _parse(
    argv: Sequence[str], main: Callable[..., None], command: CommandFlags | None, examples: str
) -> list[str]:
    argv = list(argv)
    if {"--help", "-help", "-h", "--helpshort"} & set(argv):
        with _reader_may_leave():
            print(_help_text(main, command, examples))
        sys.exit(0)
    if command is None:
        flags.FLAGS(argv[:1])
        return argv
    try:
        if _CONFIG_FLAG in command.values:
            words = (word.lstrip("-") for word in argv[1:] if word.startswith("-"))
            command.names_config = any(
                re.match(rf"{_CONFIG_FLAG}[.=]|{_CONFIG_FLAG}$", w) for w in words
            )
            argv = _resolve_config(argv, command.default_config)
            sys.argv = argv  # ml_collections reads the overrides from there
        rest = command.parse(argv)
    except InputError as error:
        _fail(str(error))
    except flags.Error as error:
        message = str(error)
        missing = re.match(r"flag --(\w+)=None: Flag --\w+ must have a value", message)
        _fail(f"--{missing[1]} is required: see --help" if missing else message)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value, see --help")
    return rest


def _resolve_config(argv: list[str], default: str | None) -> list[str]:
    """Put the config's file in place of its name, and refuse overrides of keys it lacks."""
    value, argv = _pop_config(argv)
    if value is None:
        value = default
    if not value:
        raise InputError("--config is required: a config file or a shipped name, see --help")
    try:
        config = load_config(value)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--config={value}: {type(error).__name__}: {error}") from error
    for argument in argv[1:]:
        override = re.match(rf"--?(?:no)?{_CONFIG_FLAG}\.([^=]*)", argument)
        if override:
            _check_key(override[1], config)
    name, *rest = value.split(":", 1)
    return [argv[0], f"--{_CONFIG_FLAG}=" + ":".join([str(find_config(name)), *rest]), *argv[1:]]


def _pop_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of the last `--config`, and argv without any."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word in (f"--{_CONFIG_FLAG}", f"-{_CONFIG_FLAG}"):
            value = next(words, "")
        elif word.startswith((f"--{_CONFIG_FLAG}=", f"-{_CONFIG_FLAG}=")):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return value, rest


def _check_key(dotted: str, config: ConfigDict) -> None:
    legal = set(_leaves(config))
    if dotted in legal:
        return
    if any(key.startswith(dotted + ".") for key in legal):
        raise InputError(
            f"--config.{dotted} is a section: set one of its keys, "
            + ", ".join(sorted(key for key in legal if key.startswith(dotted + ".")))
        )
    section, _, leaf = dotted.rpartition(".")
    in_section = [key for key in legal if key.startswith(section + ".")]
    by_leaf = {key.rpartition(".")[2]: key for key in [*sorted(legal), *in_section]}
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.5)
    hint = f"did you mean {by_leaf[close[0]]}?" if close else nearest("", in_section or config)
    raise InputError(f"unknown config key {dotted}: {hint}")


def _leaves(config: ConfigDict, prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _help_text(main: Callable[..., None], command: CommandFlags | None, examples: str) -> str:
    text = (sys.modules[main.__module__].__doc__ or "").strip()
    own = [command.values[name] for name in command.values] if command else []
    listing = ["Flags:"] if own else []
    wrapper = textwrap.TextWrapper(
        88,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    for flag in sorted(own, key=lambda flag: flag.name):
        words = " ".join((flag.help or "").replace("|", " | ").split())  # choices can be wrapped
        listing.append(wrapper.fill(f"--{flag.name}: {words}{_default(flag)}"))
    return "\n\n".join(filter(None, [text, examples.strip(), "\n".join(listing)]))


def _default(flag: flags.Flag) -> str:
    """Return what follows the help of a flag: that it is required, or its default."""
    if flag.default is None:
        return "" if all(rule.checker(None) for rule in flag.validators) else " (required)"
    words = ",".join(flag.default) if isinstance(flag.default, list) else str(flag.default)
    return f" (default: {words})" if words else ""
