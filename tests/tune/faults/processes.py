"""A run of two processes whose hyperparameters are spread over the two devices of each.

As a script, one of them: `python processes.py ID PORT FOLDER SCENARIO...`. It prints what its runs ended with.
"""

import contextlib
import datetime
import fcntl
import io
import json
import os
import pathlib
import re
import signal
import sys
import time
import warnings

import jax

if __name__ == "__main__":  # before anything asks for a device
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The same few programs are compiled by every run.
    jax.config.update("jax_compilation_cache_dir", os.path.join(sys.argv[3], "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxhpo
from jaxhpo._tune import sharded_dir

STEPS = 6
TIMES = {"seconds", "peak_bytes"}  # what differs from run to run
ANOTHER = "^The run ends on all processes, as process 1 raised [A-Za-z]+: "
SIZE = 8  # hyperparameters, two a device
SOLVER = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h["goal"]) ** 2), lambda h: optax.sgd(h["rate"]))


def outer_loss(h, carry, key):
    """Warm-started and noisy: a run that is resumed with a wrong state or key ends elsewhere."""
    sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(carry), h, num_steps=3)
    noise = 0.1 * jax.random.normal(key, (SIZE,))
    return jnp.mean((sol.params - 1.5 + noise) ** 2), sol.state, {"params": sol.params}


def spread(x) -> jax.Array:
    """The array, a part of it on each device of all processes; a number whole."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    parts = PartitionSpec("all") if x.ndim else PartitionSpec()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, parts), lambda i: x[i])


def regression(place):
    """`make_outer_loss` of a ridge regression whose data are closed over, as `place` puts them on devices."""
    rng = np.random.default_rng(0)
    x, y = place(rng.normal(size=(SIZE, 3))), place(rng.normal(size=SIZE))
    solver = jaxhpo.from_optax(lambda w, h, b: jnp.mean((x @ w - y) ** 2) + jnp.sum(h * w**2), optax.sgd(0.1))

    def make_outer_loss(adjoint):
        def outer_loss(h):
            sol = jaxhpo.solve(solver, solver.init(jnp.zeros(3), h), h, num_steps=10, adjoint=adjoint)
            return jnp.mean((x @ sol.params - y) ** 2)

        return outer_loss

    return make_outer_loss


def search(make_outer_loss, start=0.1):
    """Runs `tune` on the regression, without a folder."""
    loss = make_outer_loss(jaxhpo.Unroll())
    return jaxhpo.tune(loss, jnp.full(3, start), optax.adam(0.1), num_steps=3, progress=False)


def tune(folder, steps=STEPS, first=0.1, loss=None, late=False, **settings):
    """Runs `tune`; hyperparameters and moments are sharded from the start, and all else, or `late`: after one step."""
    place = jnp.asarray if late else spread
    start = {"goal": spread(np.linspace(first, 0.8, SIZE)), "rate": place(np.float64(0.02))}
    return jaxhpo.tune(
        loss or outer_loss,
        start,
        optax.adam(0.1),
        num_steps=steps,
        transforms={"goal": None, "rate": jaxhpo.box(0.0, 0.4)},
        carry=SOLVER.init(place(np.zeros(SIZE)), start),
        run_dir=folder,
        resume="continue",
        progress=False,
        **({"save_every": 1} | settings),
    )


def told(result) -> dict:
    """Returns the end of a run without times; the bits of arrays as hexadecimal numbers."""
    tree = (result.hparams, result.best_hparams, result.carry.params)
    spread = not result.hparams["goal"].is_fully_addressable
    arrays = multihost_utils.process_allgather(tree, tiled=True)
    history = {name: rows for name, rows in result.history.items() if name not in TIMES}
    end = [np.asarray(x).tobytes().hex() for x in jax.tree.leaves((arrays, history, result.best_value))]
    return {"status": result.status, "message": result.message, "spread": spread, "end": end}


# --- scenarios, in each process: (folder) -> results ------------------------------------------------------------------


def undisturbed(folder):
    """Without interruption, and without a folder."""
    return [tune(None, late=True)]


def closed_over(folder):
    """Losses close over data that are spread over the processes."""
    make_outer_loss = regression(spread)
    result = search(make_outer_loss)
    check = jaxhpo.check_hypergradient(make_outer_loss(jaxhpo.Unroll()), result.hparams)
    comparison = jaxhpo.compare(make_outer_loss, result.hparams, [jaxhpo.Implicit()], repeats=1, progress=False)
    with contextlib.redirect_stdout(None):
        plan = jaxhpo.memory_plan(make_outer_loss(jaxhpo.Unroll()), result.hparams)
    told = [*result.history["value"].tolist(), check.relative_error, comparison.rows[0].relative_error, len(plan.rows)]
    return [json.dumps(told), refusal(lambda: search(make_outer_loss, 1e200))]


def disagreeing(folder):
    """Each process has another start, key, rate or number of steps, or its own part of the data; one has a callback."""
    first, steps = jax.process_index() == 0, []
    loss = lambda h, data=0.0: jnp.sum((h - data) ** 2)  # noqa: E731

    def run(loss=loss, h=1.0, rate=0.1, **settings):
        return jaxhpo.tune(loss, jnp.full(3, h), optax.sgd(rate), progress=False, **({"num_steps": 2} | settings))

    run(callbacks=[steps.append] if first else [])
    key, data = jax.random.key(jax.process_index()), float(first)
    runs = [{"h": 1.0 + first}, {"key": key, "num_steps": 2 + first}, {"rate": 0.1 + 0.1 * first}]
    runs += [{"loss": lambda h: loss(h, data)}]
    return [refusal(lambda settings=settings: run(**settings)) for settings in runs]


def struck(folder):
    """Process 1 has no memory left: for a trace, an argument, a callback, a monitor, a checkpoint; it gets Ctrl-C."""
    there, write, ends = jax.process_index() == 1, sharded_dir._write_part, []
    status = pathlib.Path(folder, "status.json")

    def strike(step=None):
        if there and (step is None or step.step == 1):
            raise MemoryError("no more")
        return 0.0

    def interrupt(step):
        if step.step == 1 and there:
            os.kill(os.getpid(), signal.SIGINT)

    argument = {"steps": 0.5 if there else STEPS}
    trace = {"loss": lambda h, carry, key: (strike(), outer_loss(h, carry, key))[1]}
    for settings in (argument, trace, {"monitor": lambda info: strike()}, {"callbacks": [strike]}, {}):
        sharded_dir._write_part = write if settings else lambda *args: strike()
        try:
            tune(folder, **settings)
        except (MemoryError, jaxhpo.JaxhpoError) as error:
            first_alone(lambda: None)  # which writes the status
            told = json.loads(status.read_text()) if status.exists() else {"status": "none"}
            ends.append(f"{told['status']}: {re.sub(ANOTHER, '', str(error))}")
            first_alone(lambda: None)
            first_alone(lambda: [path.unlink() for path in pathlib.Path(folder).glob("*.json")])
    sharded_dir._write_part = write
    return [*ends, tune(folder, callbacks=[interrupt]), tune(folder)]


def examined(folder):
    """Process 1 has no memory for a trace of a check, or gets Ctrl-C in one; then for one rule alone."""
    there, make_outer_loss, h = jax.process_index() == 1, regression(spread), jnp.full(3, 0.1)
    rules = [jaxhpo.Implicit(jaxhpo.Identity(0.1)), jaxhpo.FiniteDifference(0.1)]

    def striking(adjoint=None, before=0, error=MemoryError):
        traces, outer_loss = [], make_outer_loss(adjoint or jaxhpo.Unroll())

        def struck(h):
            traces.append(0)
            if there and len(traces) > before:
                raise error("no more")
            return outer_loss(h)

        return struck

    def compared(rule, error=MemoryError):
        make = lambda own: striking(own, error=error) if own == rule else make_outer_loss(own)  # noqa: E731
        return jaxhpo.compare(make, h, rules, repeats=1, progress=False)

    checks = [
        lambda: jaxhpo.check_hypergradient(striking(), h),
        lambda: jaxhpo.check_hypergradient(striking(before=1), h),  # the differences
        lambda: jaxhpo.memory_plan(striking(before=2), h),
        lambda: compared(rules[1], KeyboardInterrupt),
    ]
    ends = []
    for check in checks:
        try:
            check()
        except (MemoryError, KeyboardInterrupt, jaxhpo.JaxhpoError) as error:
            ends.append(re.sub(ANOTHER, "", str(error)))
    comparison = compared(jaxhpo.Unroll())
    errors, reference = [row.error for row in comparison.rows], comparison.reference
    return [*ends, json.dumps([errors, reference.name, reference.text.replace("JaxhpoError: Process 1 raised ", "")])]


def unshared(folder):
    """The folder of process 1 is another, is missing, is a file; or is the same by another name."""
    sharded_dir.PATIENCE, here = 0.5, pathlib.Path(folder)
    names = ["another", "missing", "file", "link"]

    def prepare():
        for name in ("own", "another"):
            (here / name).mkdir(parents=True)
        (here / "file").touch()
        (here / "link").symlink_to("own")

    first_alone(prepare)
    os.chdir(here)
    own = ["own" if jax.process_index() == 0 else name for name in names]
    told = [refusal(lambda path=path: tune(path)) for path in own[:3]]
    left = [path.name for path in here.rglob("jaxhpo-*")]
    sharded_dir.PATIENCE = 10
    return [*told, str(left), tune(own[3])]


def grown(folder):
    """Goes on where one process has stopped."""
    return [tune(folder)]


def local(folder):
    """All that is tuned lies on the devices of each process alone, and is the same on all."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("own",))
    goal = jax.device_put(np.arange(4.0), NamedSharding(mesh, PartitionSpec("own")))
    settings = {"run_dir": folder, "save_every": 1, "progress": False}
    run = lambda steps: jaxhpo.tune(  # noqa: E731
        lambda h: jnp.sum((h - goal) ** 2), jnp.zeros_like(goal), optax.adam(0.1), num_steps=steps, **settings
    )
    run(2)
    return [run(3).message]


def continued(folder):
    """Stopped after three steps, and resumed."""
    return [tune(folder, 3, late=True), tune(folder, late=True)]


def first_alone(change):
    """Calls `change` on process 0, while the other waits."""
    if jax.process_index() == 0:
        change()
    multihost_utils.sync_global_devices("changed")


def damaged(folder):
    """Before three resumptions, the newest checkpoint gets a wrong byte, loses a file, loses its seal."""
    newest = lambda: sorted(pathlib.Path(folder).glob("state-*.parts"))[-1]  # noqa: E731

    def data():
        return newest() / "part-1.npz"

    def garble():
        old = bytearray(data().read_bytes())
        old[len(old) // 2] ^= 1
        data().write_bytes(old)

    def lose():
        data().unlink()

    def unseal():
        next(newest().glob("sealed-*.json")).unlink()

    results = [tune(folder, 3)]
    for steps, change in ((4, garble), (5, lose), (STEPS, unseal)):
        first_alone(change)
        results.append(tune(folder, steps))
    return results


def stopped(folder):
    """A run that clock, signal and full disks end or disturb one after another.

    Clocks disagree: on process 0 alone a save is due and the time is spent, in the first step. Process 1 alone receives
    SIGTERM, after the fourth. Its disk refuses its part of the fifth checkpoint, that of process 0 the last seal.
    """
    late, seal, write = jax.process_index() == 0, sharded_dir.ShardedDir._seal, sharded_dir._write_part

    def slow(step):
        time.sleep(0.3 * late * (step.step == 1))

    def strike(step):
        if step.step == 3 and not late:
            os.kill(os.getpid(), signal.SIGTERM)

    def refusing_seal(self, *args):
        if self.num_rows == STEPS:
            raise OSError("No space left")
        seal(self, *args)

    def refusing_part(path, arrays):
        if not late and path.parent.name == f"state-{STEPS - 1:08d}.parts":
            raise OSError("No space left")
        write(path, arrays)

    every = datetime.timedelta(seconds=0.25 if late else 1e6)
    timed = tune(folder, callbacks=[slow], save_every=every, max_seconds=0.01 if late else 1e6)
    results = [timed._replace(message="each tells its own time"), tune(folder, callbacks=[strike])]
    sharded_dir.ShardedDir._seal, sharded_dir._write_part = refusing_seal, refusing_part
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results.append(tune(folder))
    sharded_dir.ShardedDir._seal, sharded_dir._write_part = seal, write
    return [*results, *(str(w.message) for w in caught if "could not be saved" in str(w.message)), tune(folder)]


def refused(folder):
    """Another start, a folder in use, a damaged checkpoint: all processes raise, although 0 alone reads the folder."""
    tune(folder, 1)
    told = [refusal(lambda: tune(folder, first=0.2))]
    lock = open(os.path.join(folder, "lock"), "rb")  # noqa: SIM115
    first_alone(lambda: fcntl.flock(lock, fcntl.LOCK_EX))
    told.append(refusal(lambda: tune(folder)))
    lone = pathlib.Path(folder, "alone")
    first_alone(lambda: (lone.mkdir(), (lone / f"state-00000001-{'0' * 64}.npz").touch()))
    return [*told, refusal(lambda: tune(lone))]


def refusal(run) -> str:
    try:
        run()
    except jaxhpo.JaxhpoError as error:
        return str(error)
    raise AssertionError("not refused")


def documented(folder):
    """The script of the page on several hosts, from where it has connected, as this one has, of fewer steps."""
    page = (pathlib.Path(__file__).parents[3] / "docs" / "several_hosts.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    before, script = block.split("jax.distributed.initialize()")
    assert before == "import sys\n\nimport jax\n\n"  # nothing yet that asks for a device
    for steps, fewer in ((50, 5), (20, 3)):
        script = script.replace(f"num_steps={steps}", f"num_steps={fewer}")
    given, printed, code = sys.argv, io.StringIO(), None
    sys.argv = ["script.py", folder]
    try:
        with contextlib.redirect_stdout(printed):
            exec(script, {"__name__": "__main__", "sys": sys, "jax": jax})
    except SystemExit as ended:
        code = ended.code
    sys.argv = given
    assert ("TuneResult(best_value=" in printed.getvalue()) == (jax.process_index() == 0)
    return [f"ended with {code}"]


def killed(folder):
    """Slow enough to be killed between any two steps."""
    return [tune(folder, callbacks=[lambda step: time.sleep(0.3)])]


def main() -> None:
    folder, scenarios = sys.argv[3], sys.argv[4:]
    for name in scenarios:
        for result in globals()[name](os.path.join(folder, name)):
            line = {"refusal": result} if isinstance(result, str) else told(result)
            print(json.dumps({"scenario": name, **line}), flush=True)


if __name__ == "__main__":
    main()
