"""Eight CPU devices, strict promotion for the library's own tests, and the hypothesis profile."""

import os
from pathlib import Path

# Read when JAX starts its CPU backend, so it must be set before anything imports jax.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_LIBRARY = Path(__file__).resolve().parent.parent / "jaxquant"

hypothesis.settings.register_profile(
    "jaxquant",
    deadline=None,  # the first example of a law compiles
    max_examples=30,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxquant")


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config):
    if config.getoption("--run-slow") and config.option.markexpr == "not slow":
        config.option.markexpr = ""


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """In tests/test_X.py of a module jaxquant/X, ranks and dtypes promote only where we say so.

    Tests that run other libraries' arithmetic (optimizers) opt out with the marker
    `default_promotion`.
    """
    module = request.path.stem.removeprefix("test_")
    ours = (_LIBRARY / f"{module}.py").exists() or (_LIBRARY / module).is_dir()
    if not ours or request.node.get_closest_marker("default_promotion"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Let go of what a file compiled: Linux gives a process 65,530 memory maps, and XLA dies."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Compiled programs of experiments, for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


@pytest.fixture(scope="module")
def compilation_cache(cache_folder):
    """Runs of the same experiment share their compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    old = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(cache_folder))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in old.items():
        jax.config.update(name, value)
