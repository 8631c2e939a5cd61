"""The command line: where configs are found, and one line for every wrong word."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gidd_jax import cli, compiled
from gidd_jax.cli import (
    config_folder,
    find_config,
    load_config,
    nearest,
    printable,
    shipped_configs,
)
from gidd_jax.errors import InputError

COMMAND = '''
"""What it does.

Examples:
  python -m command --config=tiny
"""
from gidd_jax import cli, model_flags
from gidd_jax.errors import InputError
flags = cli.CommandFlags()
CONFIG = cli.config_flag(flags, {default!r})
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
flags.DEFINE_list("shares", ["0.02", "0.1"], "Shares.")
flags.DEFINE_list("compare", [], "Runs.")
flags.DEFINE_enum("method", None, ["_".join(20 * [word]) for word in ("a", "b", "c")], "How.")
flags.DEFINE_integer("num", None, "How many.", lower_bound=1)
{required}
def main(argv):
    import sys
    print("heavy:", sorted({{"jax", "flax", "transformers", "grain"}} & set(sys.modules)))
    print("layers:", CONFIG.value.model.num_layers, "wandb:", CONFIG.value.logging.wandb)
    if WORKDIR.value == "bad":
        raise InputError("workdir 'bad' is bad:\\n  use another")
    if WORKDIR.value == "full":
        open("/dev/full", "w").write("x" * 100_000)
    if WORKDIR.value == "long":
        import os, signal
        os.kill(os.getpid(), signal.SIGINT)
    if WORKDIR.value == "compiles":
        import jax
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        jax.jit(lambda x: x + 1)(1.0)
        kept = jax.config.values
        print("kept:", kept["jax_compilation_cache_dir"], kept["jax_compilation_cache_max_size"])
    if WORKDIR.value == "talks":
        print("much\\n" * 100_000)
    if WORKDIR.value == "worker":
        raise BrokenPipeError(32, "Broken pipe")
    if WORKDIR.value == "bug":
        raise RuntimeError("a bug")
if __name__ == "__main__":
    cli.run(main, flags, resumes={resumes})
'''


@pytest.fixture
def command(tmp_path):
    """Return a function that runs a small command elsewhere and returns its result."""

    def run(
        *args: str, default: str | None = "quickstart", resumes: bool = False, required: str = ""
    ):
        script = tmp_path / "command.py"
        script.write_text(COMMAND.format(default=default, resumes=resumes, required=required))
        return subprocess.run(
            [sys.executable, str(script), *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_help_is_quick_and_shows_only_our_flags(command):
    start = time.perf_counter()
    result = command("--help")
    assert time.perf_counter() - start < 3
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("What it does.\n\nExamples:\n  python -m command")
    assert "--workdir: Folder of the run." in result.stdout
    assert "gidd, gidd_scaling, mdlm" in " ".join(result.stdout.split())
    assert result.stdout.count("\n  --") == 6  # none of absl's own


def test_help_says_what_is_required_and_what_is_left_out(command):
    lines = command("--help", required="model_flags.checkpoint_flag(flags)").stdout.splitlines()
    assert "  --shares: Shares. (default: 0.02,0.1)" in lines
    assert "  --compare: Runs." in lines
    assert "  --num: How many." in lines
    assert [line for line in lines if "(required)" in line] == ["      package. (required)"]
    assert max(map(len, lines)) <= 88
    for choice in ("a", "b", "c"):  # none is cut in two
        assert any("_".join(20 * [choice]) in line for line in lines)


def test_the_default_config_is_found_from_any_folder_without_heavy_imports(command):
    result = command()
    assert result.returncode == 0, result.stderr
    assert "heavy: []" in result.stdout
    assert "layers: 4 wandb: False" in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--config=gidd:base"],
        ["--config", "configs/gidd.py:base"],
        ["-config=quickstart", "--config.model.num_layers=24"],
        ["--config.model.num_layers", "24", "--config=gidd"],
    ],
)
def test_ways_to_choose_and_override_a_config(command, args):
    result = command(*args, "--config.logging.wandb")
    assert result.returncode == 0, result.stderr
    assert "layers: 24 wandb: True" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config.model.num_layer=2"],
            "key model.num_layer: did you mean model.num_layers?",
        ),
        (
            ["--config.num_layers=2"],
            "key num_layers: did you mean model.num_layers?",
        ),
        (["--config.modle.num_layers=2"], "did you mean model.num_layers?"),
        (
            ["--config.mesh.zzz=1"],
            "key mesh.zzz: use one of mesh.data, mesh.fsdp, mesh.tensor",
        ),
        (["--config.zzz=1"], "use one of adapt, checkpoint, data, logging, mesh"),
        (
            ["--config.mesh=1"],
            "mesh is a section: set one of its keys, mesh.data, mesh.fsdp",
        ),
        (["--config.model.num_layers=x"], "invalid literal for int() with base 10: 'x'"),
        (["--config.train.num_steps=1.5"], "invalid literal for int()"),
        (
            ["--config=gid"],
            "the shipped configs are adapt, ar, base, embedded, gidd, gidd_scaling, mdlm, "
            "quickstart, sft, sudoku",
        ),
        (["--config=elsewhere/gidd.py"], "no such file"),
        (["--config=gidd:huge"], "unknown size 'huge': use one of tiny, small, base, 1B"),
        (["--config=quickstart:small"], "this config takes no argument"),
        (["--config=broken.py"], "--config=broken.py: SyntaxError"),
        (["--config=empty.py"], "the file must define get_config()"),
        (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
        (["train"], "unexpected argument 'train'"),
        (["--workdir=bad"], "workdir 'bad' is bad: use another"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, args, message):
    (tmp_path / "broken.py").write_text("def get_config(:")
    (tmp_path / "empty.py").write_text("")
    result = command(*args)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_command_without_default_asks_for_a_config(command):
    result = command(default=None)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --config is required")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line_and_exit_code_1(command):
    result = command("--workdir=full")
    assert result.returncode == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("flag", ["--workdir=talks", "--workdir=few", "--help"])
def test_nothing_is_said_when_nobody_reads_on(command, tmp_path, flag):
    command("--help")  # writes the script
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "command.py"), flag],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_another_broken_pipe_is_an_error(command):
    result = command("--workdir=worker")
    assert (result.returncode, result.stderr) == (1, "error: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize(
    ("resumes", "again"), [(False, "starts again"), (True, "continues from what is done")]
)
def test_ctrl_c_is_one_line_and_exit_code_130(command, resumes, again):
    result = command("--workdir=long", resumes=resumes)
    assert result.returncode == 130
    assert result.stderr == (
        f"error: interrupted; no file is half-written: the same command {again}\n"
    )


def test_a_bug_keeps_its_traceback(command):
    result = command("--workdir=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_an_existing_file_wins_over_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/gidd.py") == config_folder() / "gidd.py"
    own = Path("configs/gidd.py")
    own.parent.mkdir()
    own.write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'own': 1})"
    )
    assert load_config("configs/gidd.py") == ConfigDict({"own": 1})
    assert find_config("gidd") == config_folder() / "gidd.py"


@pytest.mark.parametrize(
    "name", ["ablation", "sweeps/ablation", "configs/sweeps/ablation.py", "sweeps/ablation.py"]
)
def test_sweeps_are_found_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == config_folder() / "sweeps" / "ablation.py"
    assert set(load_config(name)) == {"base", "grid"}


def test_a_short_name_means_one_config():
    names = [name.rpartition("/")[2] for name in shipped_configs()]
    assert len(set(names)) == len(names) >= 6


def test_configs_inside_the_package_are_found_as_a_wheel_ships_them(tmp_path):
    package = tmp_path / "site" / "gidd_jax"
    shutil.copytree(config_folder(), package / "configs")
    for name in ("__init__.py", "cli.py", "compiled.py", "errors.py"):
        shutil.copy(Path(cli.__file__).parent / name, package)
    code = (
        "from gidd_jax import cli; print(cli.load_config('configs/mdlm.py:tiny').model.num_layers)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "8\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n", "a\tb\n"),
        ("\x1b[2J\x00\x9b\r\n", "\\x1b[2J\\x00\\x9b\\r\n"),
        ("\u202e\u2028\ufeff\ud800", "\\u202e\\u2028\\ufeff\\ud800"),
        ("\u00e9\u00a0\u3000\u200c\U0001f468\u200d\U0001f33e", None),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert printable(text) == (text if shown is None else shown)


def test_nearest_word():
    assert nearest("hybird", ["masked", "hybrid"]) == "did you mean hybrid?"
    assert nearest("zzz", ["masked", "hybrid"]) == "use one of hybrid, masked"


def test_run_refuses_what_load_config_refuses():
    with pytest.raises(InputError, match="shipped configs are"):
        load_config("nothing")


def test_compiled_programs_are_kept_in_the_users_cache(command, tmp_path, monkeypatch):
    """In a folder of this machine, up to a size; where the user's own variable says, if there is
    one."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    printed = command("--workdir=compiles").stdout
    (folder,) = (tmp_path / "cache/gidd_jax/compiled").iterdir()
    assert f"kept: {folder} {compiled.MOST_BYTES}" in printed
    (kept,) = folder.glob("jit__lambda*-cache")
    # What a killed process left would stop JAX from writing: it is dropped.
    kept.with_name(kept.name.replace("-cache", "-atime")).unlink()
    assert "UserWarning" not in command("--workdir=compiles").stderr
    assert kept.exists()
    assert kept.with_name(kept.name.replace("-cache", "-atime")).exists()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    # Without a limit: JAX writes nothing more to a folder that was filled without one.
    assert f"kept: {tmp_path / 'mine'} -1\n" in command("--workdir=compiles").stdout
    assert list((tmp_path / "mine").glob("jit__lambda*"))


def test_all_commands_in_one_interpreter():
    """Each has its own flags, of which several names are the same; absl's have none of them."""
    script = """
import importlib
from absl import flags
from gidd_jax.command import COMMANDS
before = set(flags.FLAGS)
modules = [importlib.import_module(f"gidd_jax.{name}") for name in COMMANDS]
importlib.import_module("gidd_jax.data.build_assets")
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
own = {m.__name__.split(".")[1]: m.flags for m in modules if hasattr(m, "flags")}
print(len(modules) - len(own), sum("out" in command.values for command in own.values()))
own["sample"].parse(["sample", "--checkpoint=a", "--seed=3", "--verbosity=-1"])
own["highlight"].parse(["highlight", "--checkpoint=b"])
print(own["sample"].values.checkpoint, own["highlight"].values.checkpoint)
print(own["sample"].values.seed, own["highlight"].values.seed, flags.FLAGS.verbosity)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    harness_alone, with_out, *rest = done.stdout.split()
    assert harness_alone == "1"
    assert int(with_out) >= 8
    assert rest == ["a", "b", "3", "0", "-1"]


@pytest.mark.parametrize("several", [False, True])
def test_several_processes_keep_no_programs(monkeypatch, several):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "restored afterwards")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "restored afterwards")
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        del os.environ[name]
    compiled.keep_compiled_programs(several)
    assert ("JAX_COMPILATION_CACHE_DIR" in os.environ) is not several
