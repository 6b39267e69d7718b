"""Eight host devices, float64 and cheap code generation for every test; each test says where it wants another setting.

Two thirds of the time of the tests is compilation of small programs that run once, so XLA optimises little. What
depends on its optimisation (memory, time, one closed form a rule) is marked `codegen`, and runs in a process
that leaves XLA as it comes: `JAXHPO_TEST_CODEGEN=default pytest -m codegen`.
"""

import gc
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile

import orphans
import pytest

# Without cached bytecode each process of a test spends two of its three seconds of imports on compiling jax's modules.
# Where the environment wants none in the source tree, a folder of the test run takes it.
BYTECODE = None
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    BYTECODE = os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp(prefix="jaxhpo-bytecode-")
    sys.dont_write_bytecode = False

# Before jax is imported, and in each worker of xdist anew.
DEFAULT_CODEGEN = os.environ.get("JAXHPO_TEST_CODEGEN") == "default"
# jaxlib 0.12 aborts at the flag; newer ones than 0.10 are tested as they come.
CHEAP = not DEFAULT_CODEGEN and [int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2]] <= [0, 10]
DEVICES, NO_FUSION = "--xla_force_host_platform_device_count=8", "--xla_cpu_use_fusion_emitters=false"
# What is inherited, of a pytest around this one, say, goes: a `codegen` test never runs otherwise than as it is marked.
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in (DEVICES, NO_FUSION)] + [DEVICES]
if CHEAP:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags.append(NO_FUSION)
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# Traces make many objects that live long: at its usual intervals the collector of cycles takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Compiles a program of the module once, also where another function does the same."""
    import helpers  # which imports jax

    with helpers.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def pytest_addoption(parser):
    parser.addoption("--one-per-function", action="store_true", help="run the first case of each test function only")


def pytest_configure(config):
    """A plugin that had imported jax before would have left the variables without effect."""
    if CHEAP and not jax.config.read("jax_disable_most_optimizations"):
        raise pytest.UsageError("jax was imported before tests/conftest.py could set its environment")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; tests send Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    orphans.watch()
    if "JAXHPO_DATA_DIR" in os.environ:
        sys.addaudithook(refuse_network)


def pytest_unconfigure(config):
    orphans.end()
    if BYTECODE is not None:
        shutil.rmtree(BYTECODE, ignore_errors=True)


def refuse_network(event, args):
    """Refuses connections to other machines if a mirror is named: tests then use the mirror alone."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        raise OSError(f"{host} is not asked: JAXHPO_DATA_DIR is set, and the tests keep to it")


@pytest.hookimpl(trylast=True)  # after the selection by marks
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--one-per-function"):
        return
    first: dict = {}
    for item in items:
        first.setdefault((item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)), item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item):
    if CHEAP and item.get_closest_marker("codegen"):
        pytest.fail("needs the default code generation: JAXHPO_TEST_CODEGEN=default pytest -m codegen", pytrace=False)
