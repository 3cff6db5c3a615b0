"""Eight CPU devices, quick compiles, strict promotion, the hypothesis profile, and fewer points."""

import contextlib
import ctypes
import gc
import itertools
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

_LONGEST = (
    *("test_allocate", "test_docs", "test_loop", "test_kmeans", "test_compensation"),
    *("test_quantize", "test_train", "test_everywhere", "test_blocks", "test_engine"),
)
_LIBRARY = Path(__file__).resolve().parent.parent / "jaxquant"

gc.set_threshold(50_000, 100)  # tracing makes many objects and few cycles


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every law at all of its points")
    parser.addoption(
        "--run-slow", action="store_true", help="also run tests marked slow; implies --all"
    )
    parser.addoption(
        "--optimize", action="store_true", help="compile as users do, which takes much longer"
    )


def pytest_configure(config):
    config.option.all |= config.option.run_slow
    examples = 30 if config.option.run_slow else 10 if config.option.all else 4
    hypothesis.settings.register_profile(
        "jaxquant",
        deadline=None,  # the first example of a law compiles
        max_examples=examples,
        derandomize="CI" in os.environ,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("jaxquant")
    if config.option.run_slow and config.option.markexpr == "not slow":
        config.option.markexpr = ""
    # XLA would compile a program in parts, one for each core, of which there are more workers; and
    # where there is such an option (later versions of JAX have none), it generates code without
    # MLIR, which with `quick_to_compile` takes a quarter of the time.
    if not config.getoption("--optimize"):
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # not read yet
        if jax.__version_info__ < (0, 11):
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay: no collection need look at them


@pytest.hookimpl(trylast=True)  # after -k and -m: a test that is asked for keeps a point
def pytest_collection_modifyitems(config, items):
    """Leave points out, and begin with the files whose tests take longest.

    So no worker is left alone with one of them. Tests that the command line names run as they are.
    """
    files = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: files.get(item.path.stem, len(files)))
    if config.option.all or any("::" in argument for argument in config.args):
        return
    laws = itertools.groupby(items, lambda item: item.nodeid.partition("[")[0])
    kept = {item for _, points in laws for item in few(list(points))}
    left_out = [item for item in items if item not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in kept]
    config.stash[_LEFT_OUT] = len(left_out)


def few(points):
    """Return few points of one law, among them every value of each of its parameters.

    Those marked `further` are left out. Where parameters stand in tables of their own, next comes
    the point that has most values not seen yet.
    """
    points = [point for point in points if not point.get_closest_marker("further")]
    values = {point: _rows(point) for point in points}
    missing, kept = set().union(*values.values()), set()
    while missing:
        best = max(points, key=lambda point: len(values[point] & missing))  # the first of equals
        missing -= values[best]
        kept.add(best)
    return [point for point in points if point in kept] or points


def _rows(point):
    """Return the rows of its tables of parameters, by the identity of what is in them."""
    if not hasattr(point, "callspec"):
        return set()
    params = point.callspec.params
    tables = [mark.args[0] for mark in point.iter_markers("parametrize")]
    tables = [x.replace(" ", "").split(",") if isinstance(x, str) else x for x in tables]
    of_fixtures = [(name,) for name in params.keys() - set(itertools.chain(*tables))]
    return {
        tuple((name, id(params[name])) for name in names if name in params)
        for names in (*tables, *of_fixtures)
    }


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Workers collect the same tests, and pytest-xdist does not say what they deselect."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(_LEFT_OUT, 0):
        points = config.stash[_LEFT_OUT]
        terminalreporter.write_line(f"{points:,} further points of these laws are run by --all")


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


_CROWDED, _FULL = 2**30, 1.25 * 2**30  # bytes of a worker's memory


def _memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _trim():
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def release_memory():
    """Let go of compiled programs before they fill the memory, and of what compiling took.

    Linux gives a process 65,530 memory maps; no file of tests takes more than 25,000, and XLA dies
    of too many. What LLVM frees, two thirds of a worker's memory, glibc would keep.
    """
    yield
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        _trim()
        maps = Path("/proc/self/maps").read_text().count("\n")
        if maps > 10_000 or _memory() > _CROWDED:
            jax.clear_caches()
            _trim()


@pytest.fixture(autouse=True)
def release_what_compiling_took():
    """Let go of it within a file too, where it is much, and of programs where they are too many."""
    yield
    with contextlib.suppress(OSError, AttributeError):
        if _memory() > _CROWDED:
            _trim()
        if _memory() > _FULL:
            jax.clear_caches()
            _trim()


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
def experiments(quick_to_compile, cache_folder):
    """Runs of the same experiment share their compiled programs, which are not optimized."""
    with _settings(
        jax_compilation_cache_dir=str(cache_folder),
        jax_persistent_cache_min_compile_time_secs=0.0,
    ):
        yield
