"""Eight CPU devices, quick compiles, strict promotion, and the hypothesis profile."""

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

# Read when JAX starts its CPU backend, so it must be set before anything imports jax.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_LONGEST = ("test_train", "test_docs", "test_loop", "test_kmeans", "test_quantize", "test_blocks")
_LIBRARY = Path(__file__).resolve().parent.parent / "jaxquant"

gc.set_threshold(50_000, 100)  # tracing makes many objects and few cycles


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--optimize", action="store_true", help="compile as users do, which takes much longer"
    )


def pytest_configure(config):
    hypothesis.settings.register_profile(
        "jaxquant",
        deadline=None,  # the first example of a law compiles
        max_examples=30 if config.getoption("--run-slow") else 10,
        derandomize="CI" in os.environ,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("jaxquant")
    if config.getoption("--run-slow") and config.option.markexpr == "not slow":
        config.option.markexpr = ""
    # XLA would compile a program in parts, one for each core, of which there are more workers; and
    # where there is such an option (later versions of JAX have none), it generates code without
    # MLIR, which with `quick_to_compile` takes a quarter of the time.
    if not config.getoption("--optimize"):
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # not read yet
        if jax.__version_info__ < (0, 11):
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def pytest_collection_modifyitems(items):
    """Begin with the files whose tests take longest: no worker is left alone with one of them."""
    files = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: files.get(item.path.stem, len(files)))


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """In tests/test_X.py of a module jaxquant/X, ranks and dtypes promote only where we say so.

    Tests that run other libraries' arithmetic (optimizers) opt out with the marker
    `default_promotion`.
    """
    module = request.path.stem.removeprefix("test_")
    ours = any(_LIBRARY.rglob(f"{module}.py")) or any(_LIBRARY.rglob(f"{module}/"))
    if not ours or request.node.get_closest_marker("default_promotion"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def release_memory():
    """Let go of compiled programs before they fill the memory, and of what compiling took.

    Linux gives a process 65,530 memory maps; no file of tests takes more than 25,000, and XLA dies
    of too many. What LLVM frees, two thirds of a worker's memory, glibc would keep.
    """
    yield
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = Path("/proc/self/maps").read_text().count("\n")
        if maps > 10_000 or pages * resource.getpagesize() > 1.5 * 2**30:
            jax.clear_caches()
            trim(0)


@contextlib.contextmanager
def _settings(**values):
    old = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile(request):
    """Compile without optimizing: most programs run once, and compile for longer than they run."""
    with _settings(jax_disable_most_optimizations=not request.config.getoption("--optimize")):
        yield


@pytest.fixture(scope="module")
def optimized(quick_to_compile):
    """Optimize after all: programs that run for long, or are compiled for another machine."""
    jax.clear_caches()  # of programs that are not optimized
    with _settings(jax_disable_most_optimizations=False):
        yield


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Compiled programs of experiments, for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


@pytest.fixture(scope="module")
def experiments(optimized, cache_folder):
    """Runs of the same experiment share their compiled programs."""
    with _settings(
        jax_compilation_cache_dir=str(cache_folder),
        jax_persistent_cache_min_compile_time_secs=0.0,
    ):
        yield
