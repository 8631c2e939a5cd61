"""Eight virtual CPU devices, strict ranks, and the golden arrays of the original implementation."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

# Before anything touches a device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A forgotten axis must fail instead of broadcasting.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Commands that tests start, and the workers of a run on several cores, read this when they import
# jax: they share what takes long to compile, and leave the user's cache alone.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="gidd_jax_cache_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
# Said once per process, by whichever test imports it first: that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings that our own code causes are errors; those of libraries about themselves are not."""
    config.addinivalue_line("filterwarnings", r"error:::gidd_jax\.")


# On several cores a file stays on one: those that take minutes come first, not last and alone.
LONGEST = (
    "training/test_loop",
    "training/test_loop_devices",
    "test_train_command",
    "parallel/test_distributed",
    "training/test_step",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first; the others stay in their order."""
    items.sort(key=lambda item: not str(item.path.with_suffix("")).endswith(LONGEST))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Programs are small: compiling them well, here and in commands, takes longer than running
    them. Slow tests compile as users do."""
    if not any(item.get_closest_marker("slow") for item in session.items):
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_SCALING = Path(__file__).parent / "data" / "golden_scaling"
Loader = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def golden() -> Loader:
    """Loader of the arrays in tests/data/golden by file name (.npz or .safetensors)."""
    return _loader(GOLDEN)


@pytest.fixture(scope="session")
def golden_scaling() -> Loader:
    """Loader of the arrays of the scaling paper's code, in tests/data/golden_scaling."""
    return _loader(GOLDEN_SCALING)


def _loader(folder: Path) -> Loader:
    from safetensors.numpy import load_file

    def load(name: str) -> dict[str, np.ndarray]:
        if name.endswith(".safetensors"):
            return load_file(folder / name)
        with np.load(folder / name, allow_pickle=False) as file:
            return dict(file)

    return load


@pytest.fixture
def compile_well() -> Iterator[None]:
    """Compile the programs of one test as users have them: those that run for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def on_first_device() -> Iterator[None]:
    """Runs of a file use the first of the eight devices; what names devices has those."""
    from gidd_jax.parallel import sharding

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "gidd_jax.training.loop.sharding.make_mesh",
            lambda *sizes, devices=None: make_mesh(*sizes, devices=devices or jax.devices()[:1]),
        )
        yield


@pytest.fixture
def call_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Call the main of gidd_jax.plots with flags, in an empty folder; they are gone afterwards."""
    from absl.testing import flagsaver

    from gidd_jax import plots

    monkeypatch.chdir(tmp_path)

    def call(**values: object) -> None:
        saved = flagsaver.save_flag_values(plots.flags.values)
        try:
            plots.flags.parse(["plots", *(f"--{name}={value}" for name, value in values.items())])
            plots.main(["plots"])
        finally:
            flagsaver.restore_flag_values(saved, plots.flags.values)

    return call


@pytest.fixture(scope="module", autouse=True)
def own_programs() -> Iterator[None]:
    """Programs of one module are not kept for the next: those of all would fill the memory."""
    yield
    jax.clear_caches()
