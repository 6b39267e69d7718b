"""`compare` measures errors, times and memory correctly, recommends the right method, and survives broken ones."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, outer_loss, partial_sum, relative_error

import jaxhpo
import jaxhpo.data
import jaxhpo.models
from jaxhpo import CG, Direct, Forward, ForwardGradient, Identity, Implicit, Neumann, Unroll, plot
from jaxhpo._cli import problems
from jaxhpo._cli.main import main
from jaxhpo._core.record import InnerRun, SolveLog, UnrolledSolve
from jaxhpo._core.types import Schedule
from jaxhpo._diagnostics.compare import compare as comparison
from jaxhpo._diagnostics.compare import measure
from jaxhpo._diagnostics.compare.result import MethodRow, ProblemSize, Reference
from jaxhpo._diagnostics.compare.verdict import recommend
from jaxhpo._diagnostics.rows import interval_of_ratio

RIDGE, QUADRATIC = PROBLEMS["ridge"], PROBLEMS["quadratic"]


def compare(make, hparams, *args, **options):
    return jaxhpo.compare(make, hparams, *args, **({"repeats": 1, "progress": False} | options))


@dataclasses.dataclass(frozen=True)
class Broken:
    """A rule that cannot run."""

    def run(self, problem):
        raise RuntimeError("out of order")


def test_progress_names_what_is_compiled(monkeypatch, capsys):
    """From the first line on, each before it begins; what takes longer counts its parts, here without a delay."""
    monkeypatch.setattr(comparison, "EVERY", 0.0)
    p = QUADRATIC
    settings = {"reference": "differences", "progress": True}
    compare(lambda rule: outer_loss(p, rule, 3), jnp.asarray(p.hparams), [Broken()], **settings)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compare: compiling and running the outer loss"
    assert {"compare 0/4: compiling and running Broken()", "direction 3/3", "timing 1/1"} < {*lines}


def test_comparison_on_the_quadratic():
    """Ten steps on the quadratic, whose closed forms are in `jaxhpo.testing.quadratic`; a broken rule has a row."""
    p, steps, rate = QUADRATIC, 10, QUADRATIC.step_size
    rules = {"exact": Unroll(), "one step": Implicit(Identity(rate)), "broken": Broken()}
    found = compare(lambda rule: outer_loss(p, rule, steps), jnp.asarray(p.hparams), rules, num_directions=2)
    rho = (1 - 2 * rate) ** steps
    end = (1 - rho) * p.hparams + rho * p.params
    target = p.hparams - p.hypergradient(p.hparams) / 2
    # With the condition g = 2 (a - h), dg/dh = -2, and H⁻¹ replaced by the rate: da/dh = 2 rate instead of 1 - rho.
    exact, one_step = 2 * (1 - rho) * (end - target), 2 * rate * 2 * (end - target)
    assert found["exact"].relative_error == 0 and found["exact"].accurate
    assert found["one step"].relative_error == pytest.approx(relative_error(one_step, exact), rel=1e-6)
    assert found["one step"].norm_ratio == pytest.approx(2 * rate / (1 - rho), rel=1e-6)
    assert found["broken"].error == "RuntimeError: out of order" and found["broken"].gradients is None
    assert found.recommended == "exact" and found.recommendation.startswith("Use `exact`: its hypergradient is exact")
    assert found.problem.num_steps == steps and found.problem.num_params == 3
    # The condition is 2 (a - h).
    assert found.problem.start == pytest.approx(2 * np.linalg.norm(p.params - p.hparams), rel=1e-9)
    assert found.problem.end == pytest.approx(2 * np.linalg.norm(end - p.hparams), rel=1e-9)
    assert found.reference.trusted and found.reference.disagreement < 1e-8
    assert found["exact"].copies > 0 and found["exact"].gradients > 0
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["name"] for row in report["methods"]] == list(rules)
    text = str(found)
    assert "It raised RuntimeError: out of order" in text and "one step" in text and found["exact"].leaf_errors
    assert max(map(len, text.splitlines())) <= 120


# --- the recommendation, from synthetic rows -------------------------------------------------------------------------


EXACT = Reference("Unroll()", "...", 1e-9, 1e-9, True)
BY_DIFFERENCES = Reference("differences", "...", None, 1e-9, True)
CONVERGED, UNCONVERGED = ProblemSize(6, 50, 100, 10.0, 1e-9, 1.0), ProblemSize(6, 50, 100, 3.0, 0.5, 1.0)


def row(name, rule=None, error=0.0, cosine=1.0, gradients=100.0, copies=10.0, **more):
    row = MethodRow(name, rule or Unroll(), error, cosine, 1.0, None, gradients, 1.0, copies, True)
    return row._replace(**more)


def test_fastest_accurate_method_is_recommended():
    rows = [row("slow"), row("fast", error=9e-3, gradients=50.0), row("rough", error=2e-2, gradients=10.0)]
    assert recommend(rows, EXACT, CONVERGED)[0] == "fast"
    rotated = [row("rotated", cosine=0.99, gradients=10.0), row("slow")]
    assert recommend(rotated, EXACT, CONVERGED)[0] == "slow"


def test_equally_fast_methods_are_ranked_by_error_then_memory():
    rows = [row("a", error=1e-3, gradients=95.0), row("b", error=1e-8), row("c", error=1e-9, copies=5.0)]
    assert recommend(rows, EXACT, CONVERGED)[0] == "c"
    assert recommend(rows[:2], EXACT, CONVERGED)[0] == "b"


def test_smaller_method_is_named_where_memory_is_large():
    rows = [row("big", copies=1000.0), row("small", gradients=140.0, copies=20.0), row("slow", gradients=160.0)]
    name, text = recommend(rows, EXACT, CONVERGED)
    assert name == "big" and "`small` needs 20 and takes 1.4 times as long" in text
    assert "memory" not in recommend([rows[0], rows[2]], EXACT, CONVERGED)[1]


@pytest.mark.parametrize(
    "bad",
    [
        {"finite": False, "relative_error": None},
        {"blind": ("hparams['rate']",)},
        {"error": "ValueError: no"},
    ],
)
def test_unusable_methods_are_never_recommended(bad):
    rows = [row("bad", gradients=1.0)._replace(**bad), row("good")]
    name, text = recommend(rows, EXACT, CONVERGED)
    assert name == "good" and "Not to be trusted here: `bad`" in text
    name, text = recommend(rows[:1], EXACT, CONVERGED)
    assert name is None and text.startswith("Trust none") and "`Unroll()`, is exact: use that" in text
    assert "use that" not in recommend(rows[:1], BY_DIFFERENCES, CONVERGED)[1]


def test_nearest_of_approximate_methods_is_recommended():
    rows = [row("a", error=0.4, cosine=0.95, gradients=1.0), row("b", error=0.2, cosine=0.98)]
    name, text = recommend(rows, BY_DIFFERENCES, CONVERGED)
    assert name == "b" and text.startswith("No method in the list is accurate here. Use `b`, the nearest")
    assert recommend([row("c", error=0.8, cosine=0.6)], BY_DIFFERENCES, CONVERGED)[0] is None


REASONS = [
    (Unroll(truncate=5), CONVERGED, {}, "the last 5 inner steps"),
    (Implicit(Neumann(3, 0.1)), CONVERGED, {}, "too roughly"),
    (Implicit(Neumann(3, 0.1)), CONVERGED, {"norm_ratio": 1e3}, "series grows"),
    (Implicit(Neumann(3, 0.1)), CONVERGED, {"finite": False}, "above 2 / the largest curvature"),
    (Implicit(CG()), CONVERGED, {"linear_status": "indefinite"}, "not positive definite"),
    (Implicit(CG()), CONVERGED, {"linear_status": "stalled", "linear_residual": 0.3}, "residual of 3.0e-01"),
    (Implicit(CG()), CONVERGED, {"linear_status": "converged"}, "has not converged"),  # nothing else is left
    (Implicit(Direct()), UNCONVERGED, {}, "went from 3 to 0.5"),
    (ForwardGradient(3), CONVERGED, {}, "one draw"),
    (Broken(), CONVERGED, {}, "its approximation is too rough"),
    (Broken(), CONVERGED, {"first_error": 0.2}, "its approximation is too rough"),
    (Broken(), CONVERGED, {"first_error": 1e-3}, "right at its first call"),
    (Implicit(CG()), CONVERGED, {"blind": ("hparams['r']",)}, "it cannot see `hparams['r']`"),
]


@pytest.mark.parametrize(("rule", "problem", "more", "words"), REASONS)
def test_reason_of_failure_is_named(rule, problem, more, words):
    _, text = recommend([row("good"), row("bad", rule, error=0.5, cosine=0.7, **more)], EXACT, problem)
    assert "`bad` (" in text and words in text


def test_unconfirmed_reference_is_mentioned():
    assert "with care" in recommend([row("a")], EXACT._replace(trusted=False), CONVERGED)[1]


# --- names and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["Unroll()", "Unroll(truncate=5)", "Implicit(CG())", "Implicit(CG(maxiter=5))", "Implicit(Neumann(3, 0.1))"],
)
def test_methods_are_named_as_written_in_code(text):
    assert comparison.short_name(eval(text)) == text


def test_equal_rules_have_distinct_names():
    assert list(comparison._named([Unroll(), Unroll()])) == ["Unroll()", "Unroll() #2"]


def no_solve(adjoint):
    return lambda h: jnp.sum(h**2)


def fixed(adjoint):
    return outer_loss(QUADRATIC, Unroll(), 3)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (None, {}, "make_outer_loss"),
        pytest.param(no_solve, {}, "calls `solve` not at all", marks=pytest.mark.slow),
        pytest.param(fixed, {"adjoints": [Forward()]}, "only with Unroll", marks=pytest.mark.slow),
        (lambda adjoint: jnp.ones(3), {}, r"outer_loss\(hparams\)"),
        (lambda h: jnp.sum(h**2), {}, r"the outer loss itself.*`lambda adjoint: lambda hparams"),
        (no_solve, {"adjoints": []}, "nothing to compare"),
        (no_solve, {"adjoints": Unroll()}, "a list of rules"),
        (no_solve, {"adjoints": [Unroll]}, "the class Unroll"),
        (no_solve, {"adjoints": [CG()]}, "Implicit"),
        (no_solve, {"reference": "exact"}, "'differences'"),
        (no_solve, {"num_directions": 0}, "num_directions"),
        (no_solve, {"repeats": 0}, "repeats"),
        (no_solve, {"key": jnp.zeros(2, jnp.uint32)}, "typed key"),
        (no_solve, {"pairs": [jaxhpo.HOAG()]}, r"a name and a state.*from_pair\(pair\)"),
        (no_solve, {"pairs": {"a": jaxhpo.HOAG()}}, r"`pairs\['a'\]` got HOAG.*pair.init"),
        (no_solve, {"pairs": {"a": (jaxhpo.Hypergradient(None, None), None)}}, "`gradient` got a pair"),
    ],
)
def test_invalid_inputs_are_refused(make, options, words):
    with pytest.raises(jaxhpo.JaxhpoError, match=words):
        compare(make, jnp.ones(3), **options)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare"], ["--problem"]),
        (["compare", "--problem", "soft"], ["soft", "ridge", "hard"]),
        (["compare", "--problem", "hard", "--methods", "cg,sg"], ["--methods", "'sg'", "unroll"]),
        (["compare", "--problem", "hard", "--methods", ","], ["--methods", "no name"]),
        (["compare", "--problem", "hard", "--num-steps", "0"], ["--num-steps", "1 or more"]),
        (["compare", "--problem", "hard", "--seed", "x"], ["--seed", "'x'"]),
    ],
)
def test_invalid_command_lines_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text


def test_help_names_every_problem_and_method(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines are broken after hyphens
    assert all(name in text for name in (*problems.PROBLEMS, *problems.METHODS, "--num-steps", "--out"))


def test_output_path_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["compare", "--problem", "hard", "--out", str(file)]) == 1
    assert "name a folder" in capsys.readouterr().err


# --- the recommendation is right, by independent computations --------------------------------------------------------


def ridge_exact(h):
    return RIDGE.unrolled(h, RIDGE.step_size, 200)


def reverse_through(step, params, xs, val_loss):
    """Plain reverse mode through a plain loop, without the library's derivative rules."""

    def outer(h):
        return val_loss(jax.lax.scan(lambda p, x: (step(p, h, x), None), params, xs)[0])

    return jax.jit(jax.grad(outer))


def logistic_exact(h):
    p = PROBLEMS["logistic"]
    train_grad = jax.grad(p.train_loss)
    step = lambda w, h, _: w - p.step_size * train_grad(w, h, None)  # noqa: E731
    return reverse_through(step, jnp.asarray(p.params), jnp.arange(300), p.val_loss)(h)


def mlp_exact(h):
    parts = jaxhpo.data.digits(0, train=200, validation=300)
    params = jaxhpo.models.MLP((16, 10)).init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    params = jax.tree.map(lambda x: x.astype(float), params)
    rows = np.random.default_rng(0).integers(0, 200, (100, 50))
    xs = parts.train.inputs[rows].astype(float), jnp.asarray(parts.train.targets[rows])

    def loss(p, inputs, targets):
        hidden = jnp.tanh(inputs @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None])
        logits = hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"][None]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    def penalised(p, h, x):
        layers = [jnp.exp(log) * jnp.sum(p[layer]["kernel"] ** 2) for layer, log in h["log_penalty"].items()]
        return loss(p, *x) + sum(layers) / 2

    def step(state, h, x):  # Maclaurin's form: v ← .9 v − .1 g, p ← p + lr v
        p, v = state
        v = jax.tree.map(lambda v, g: 0.9 * v - 0.1 * g, v, jax.grad(penalised)(p, h, x))
        return jax.tree.map(lambda p, v: p + jnp.exp(h["log_rate"]) * v, p, v), v

    start = params, jax.tree.map(jnp.zeros_like, params)
    validation = parts.validation.inputs.astype(float), jnp.asarray(parts.validation.targets)
    return reverse_through(step, start, xs, lambda state: loss(state[0], *validation))(h)


def hard_exact(h):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(6, 3)) @ rng.normal(size=(3, 6)) / 6**0.5
    target, held_out = (truth + 0.3 * rng.normal(size=(6, 6)) for _ in range(2))
    U, V = (0.1 * rng.normal(size=(6, 3)) for _ in range(2))

    def step(state, h, _):
        U, V = state
        off = U @ V.T - target
        return U - 0.05 * (off @ V + jnp.exp(h)[None] * U), V - 0.05 * (off.T @ U + jnp.exp(h)[None] * V)

    return reverse_through(step, (U, V), jnp.arange(20), lambda s: jnp.sum((s[0] @ s[1].T - held_out) ** 2) / 2)(h)


# Every usual method, GMRES and a direct solve: those of the first two problems, both convex, are on one at least.
# Of the network, whose programs take long to compile, one method of each kind; the others are held to it elsewhere.
COMPARED = {
    "ridge": ("unroll", "truncated", "forward", "cg", "identity", "direct"),
    "logistic": ("unroll", "unroll-plain", "cg", "neumann", "gmres", "direct"),
    "mlp": ("unroll", "truncated", "neumann"),
    "hard": (*problems.USUAL, "gmres", "direct"),
}
INDEPENDENT = {"ridge": ridge_exact, "logistic": logistic_exact, "mlp": mlp_exact, "hard": hard_exact}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxhpo.ZeroHypergradientWarning")
@pytest.mark.parametrize("name", list(INDEPENDENT))
def test_recommendation_agrees_with_independent_errors(name):
    """Each error is measured again against a plain loop; the recommended method is the fastest accurate one."""
    if name == "mlp":
        pytest.importorskip("sklearn")
    problem = problems.PROBLEMS[name](0)
    rules = [problems.METHODS[method](problem) for method in COMPARED[name]]
    # What is asserted of times is asserted of the table's own, however noisy.
    found = compare(problem.make_outer_loss, problem.hparams, rules, repeats=2)
    exact = flat(INDEPENDENT[name](problem.hparams))
    errors, cosines = {}, {}
    for line in found.rows:
        grad = flat(jax.jit(jax.grad(problem.make_outer_loss(line.rule)))(problem.hparams))
        if not line.finite:  # a linear solve that failed
            assert line.linear_status == "indefinite" and np.isnan(grad).any()
            continue
        errors[line.name] = relative_error(grad, exact)
        cosines[line.name] = grad @ exact / (np.linalg.norm(grad) * np.linalg.norm(exact))
        # Rounding of an unstable run is all that may differ: 1e-9 of the reference.
        assert line.relative_error == pytest.approx(errors[line.name], rel=1e-6, abs=1e-9)
        assert line.cosine == pytest.approx(cosines[line.name], abs=1e-9)
    good = {method for method in errors if errors[method] <= 1e-2 and cosines[method] >= 0.999}
    assert found.recommended in good, found
    # Times within a tenth count as equal.
    assert found[found.recommended].gradients <= 1.1 * min(found[method].gradients for method in good), found
    assert found.reference.trusted and found.reference.name == "Unroll()"
    implicit = {line.name for line in found.rows if isinstance(line.rule, Implicit)}
    if name == "hard":
        assert not good & implicit and "Unroll(truncate=2)" not in good
        assert found["Implicit(CG())"].linear_status == "indefinite"
        assert "has not converged" in found.recommendation and "not positive definite" in found.recommendation
    elif name == "mlp":
        assert all(found[method].blind == ("hparams['log_rate']",) for method in implicit)
        assert "cannot see `hparams['log_rate']`" in found.recommendation
    else:
        assert {"Implicit(CG())", "Implicit(Direct())"} <= good
        assert found["Implicit(CG())"].linear_status == "converged"


@pytest.mark.slow
def test_errors_are_those_of_the_closed_forms():
    """Ridge at its solution, where every rule has a closed form in NumPy."""
    h, a, steps = RIDGE.hparams, RIDGE.step_size, 400
    exact = RIDGE.unrolled(h, a, steps)
    rules = {
        "identity": (Implicit(Identity(a)), RIDGE.partial(h, lambda H: a * np.eye(len(H)))),
        "neumann": (Implicit(Neumann(5, a)), RIDGE.partial(h, lambda H: partial_sum(H, a, 5))),
        "truncated": (Unroll(truncate=3), RIDGE.unrolled(h, a, steps, 3)),
    }
    make = functools.partial(outer_loss, RIDGE, num_steps=steps)
    methods = {name: rule for name, (rule, _) in rules.items()}
    for options in ({}, {"reference": Implicit(Direct())}, {"reference": "differences"}):
        found = compare(make, jnp.asarray(h), methods, **options)
        # Central differences are good to 1e-8 here.
        rel = 1e-6 if options else 1e-8
        for name, (_, want) in rules.items():
            assert found[name].relative_error == pytest.approx(relative_error(want, exact), rel=rel)
            ratio = np.linalg.norm(want) / np.linalg.norm(exact)
            assert found[name].norm_ratio == pytest.approx(ratio, rel=rel)
            assert found[name].cosine == pytest.approx(want @ exact / np.linalg.norm(want) / np.linalg.norm(exact))
    assert found.reference.name == "differences" and found["identity"].leaf_errors is not None


@pytest.mark.slow
def test_diverging_and_blind_methods_are_named():
    """Neumann far beyond 2/curvature overflows; a learning rate is invisible to `Implicit`, partly to truncation."""

    def train_loss(w, h, batch):
        return RIDGE.train_loss(w, h["penalty"], batch)

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(lambda t: h["rate"][t // 50]))

    def make(rule):
        def loss(h):
            start = solver.init(jnp.asarray(RIDGE.params), h)
            return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=100, adjoint=rule).params)

        return loss

    rules = {
        "exact": Unroll(),
        "nan": Implicit(Neumann(2000, 100.0)),
        "blind": Implicit(CG()),
        "half": Unroll(truncate=50),
    }
    h = {"penalty": jnp.asarray(RIDGE.hparams), "rate": jnp.full(2, 0.1)}
    found = compare(make, h, rules)
    assert found.recommended == "exact"
    assert found["nan"].finite is False and found["nan"].relative_error is None and not found["nan"].usable
    assert "diverges" in found["nan"].notes[0]
    assert found["blind"].blind == found["half"].blind == ("hparams['rate']",)
    assert found["blind"].leaf_errors["hparams['rate']"] == 1.0
    assert "It cannot see `hparams['rate']`." in found["blind"].notes
    assert found["half"].partly_blind == ("hparams['rate']",) and not found["blind"].partly_blind
    assert "It sees only some entries of `hparams['rate']`." in found["half"].notes
    assert "NO" in str(found) and "-" in str(found)
    # Along fewer random directions than hyperparameters the leaf is known only from the rule's own warning.
    found = compare(make, h, rules, reference="differences", num_directions=3)
    assert found["blind"].blind == found["half"].blind == ("hparams['rate']",)
    assert found["blind"].leaf_errors is None and found["exact"].relative_error < 1e-7


@pytest.mark.slow
def test_tangents_replace_a_wrong_reference():
    """A loss with a wrong `custom_vjp`: the tangents contradict reverse mode, and take its place."""

    @jax.custom_vjp
    def square(x):
        return jnp.sum(x**2)

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g * x,))  # half of the true derivative
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))

    def make(rule):
        return lambda h: square(jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=20, adjoint=rule).params)

    found = compare(make, jnp.arange(1.0, 4.0), [Unroll()])
    assert found.reference.name == "tangents" and "contradicts them" in found.reference.text
    assert found["Unroll()"].relative_error == pytest.approx(0.5, rel=1e-6)
    assert found.recommended == "Unroll()" and "nearest" in found.recommendation  # the direction is right


@pytest.mark.slow
def test_rough_outer_loss_is_mentioned():
    """Oscillations finer than a step: tangents are right, but foretell nothing; differences contradict themselves."""

    def make(rule):
        loss = outer_loss(QUADRATIC, rule, 5)
        return lambda h: loss(h) + 1e-3 * jnp.sum(jnp.sin(1e5 * h))

    found = compare(make, jnp.asarray(QUADRATIC.hparams), [Unroll()])
    assert found.reference.name == "Unroll()" and not found.reference.trusted
    assert "foretells little" in found.reference.text and "with care" in found.recommendation
    assert found["Unroll()"].predictivity is None and "foretells" not in str(found).split("---")[0].splitlines()[-1]
    found = compare(make, jnp.asarray(QUADRATIC.hparams), [Unroll()], reference="differences", step=0.3)
    # The exact slope of the oscillations is 100, that of the rest about 1.
    assert abs(found["Unroll()"].predictivity) < 0.95 and "foretells" in str(found).split("---")[0].splitlines()[-1]
    assert found.reference.name == "differences" and not found.reference.trusted


@pytest.mark.slow
def test_inner_runs_to_a_tolerance_are_compared():
    """`Unroll` cannot differentiate them: the tangents are the reference, and the default list omits it."""
    solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size))

    def make(rule):
        def loss(h):
            start = solver.init(jnp.asarray(RIDGE.params), h)
            return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=500, tol=1e-12, adjoint=rule).params)

        return loss

    found = compare(make, jnp.asarray(RIDGE.hparams))
    assert found.reference.name == "tangents" and "cannot be the reference: JaxhpoError" in found.reference.text
    assert not any(isinstance(line.rule, (Unroll, Forward)) for line in found.rows)
    assert found["Implicit(CG())"].accurate and found.problem.end < 1e-12
    assert 10 < found.problem.num_steps < 500  # the steps taken, not those allowed
    found = compare(make, jnp.asarray(RIDGE.hparams), [Unroll(), Implicit(CG())])
    assert "tol=1e-12" in found["Unroll()"].error and found.recommended == "Implicit(CG())"


@pytest.mark.slow
def test_default_rules_of_a_fixed_point_solver():
    """A `fixed_point` solver has no symmetric condition: CG would raise, so the list has GMRES."""
    solver = jaxhpo.fixed_point(lambda p, h, batch: 0.5 * p + 0.1 * jnp.flip(p) * jnp.array([1.0, 0.2]) + h)

    def make(rule):
        return lambda h: jnp.sum(
            jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=60, adjoint=rule).params ** 2
        )

    found = compare(make, jnp.ones(2))
    names = [line.name for line in found.rows]
    assert names[:3] == ["Unroll()", "Unroll(truncate=6)", "Forward()"]
    assert names[3:] == ["Implicit(GMRES())", "Implicit(Neumann(20, 1))", "Implicit(Direct())"]
    assert all(line.error is None for line in found.rows) and found["Implicit(GMRES())"].accurate


@pytest.mark.parametrize(("bytes_a_step", "thrifty"), [(2**20, True), (2**17, False)])
def test_least_memory_is_compared_where_the_default_keeps_more(bytes_a_step, thrifty):
    """Both keep everything below 16 MiB, here of 100 steps."""
    log = SolveLog()
    log.runs.append(InnerRun(100, 1.0, 1.0))
    log.schedules.append(UnrolledSolve(Unroll(), 100, Schedule(), bytes_a_step // 2, 0, 0, bytes_a_step // 2))
    assert (Unroll(checkpoint="sqrt") in comparison.default_adjoints(log, 20, True)) == thrifty


@pytest.mark.slow
def test_solves_inside_jitted_functions_are_recorded():
    """The same jitted outer loss for each rule, traced before: its solves are found, and timed without callbacks."""

    @functools.cache
    def make(rule):
        return jax.jit(outer_loss(RIDGE, rule, 30))

    h = jnp.asarray(RIDGE.hparams)
    rules = [Unroll(), Implicit(CG())]
    for rule in rules:
        make(rule)(h), jax.grad(make(rule))(h)
    found = compare(make, h, rules)
    assert found.problem.num_steps == 30
    assert found["Implicit(CG())"].linear_iterations is not None
    measured = measure.measure(make, rules[1], h)
    assert measured.linear_solves and "callback" not in measured.program.as_text()


@pytest.mark.slow
def test_steps_of_vmapped_solves_are_summed():
    """Three tasks under `vmap` are three runs of ten steps."""

    def make(rule):
        def loss(h):
            solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
            solve = lambda p: jaxhpo.solve(solver, solver.init(p, h), h, num_steps=10, adjoint=rule).params  # noqa: E731
            return jnp.sum(jax.vmap(solve)(jnp.arange(6.0).reshape(3, 2)) ** 2)

        return loss

    found = compare(make, jnp.ones(2), [Unroll()])
    assert found.problem.num_steps == 30 and found.problem.num_params == 2


@pytest.mark.slow
def test_method_that_exceeds_memory_is_not_run(monkeypatch):
    """Memory for every method but plain autodiff, which keeps every step's activations."""
    make = functools.partial(outer_loss, PROBLEMS["logistic"], num_steps=300)
    monkeypatch.setattr(measure, "available_bytes", lambda: 2 * 60_000)  # it needs 380 kB, two levels a tenth of it
    rules = [Unroll(checkpoint=20), Unroll(checkpoint=None)]
    found = compare(make, jnp.asarray(PROBLEMS["logistic"].hparams), rules)
    assert "temporary memory" in found["Unroll(checkpoint=None)"].error
    assert found.recommended == "Unroll(checkpoint=20)"


def test_interval_of_a_ratio():
    """It holds ‖x‖ / ‖y‖ in 95 of 100 draws of directions, whether the two are related or not; of multiples a point."""
    rng = np.random.default_rng(0)
    y, z = rng.normal(size=(2, 500))
    for x in (z, 0.3 * y + 0.1 * z):
        inside, true = 0, np.linalg.norm(x) / np.linalg.norm(y)
        for _ in range(1000):
            rows = rng.normal(size=(8, 500))
            low, high = interval_of_ratio(rows @ x, rows @ y)
            inside += low <= true <= high
        assert abs(inside / 1000 - 0.95) < 4 * (0.95 * 0.05 / 1000) ** 0.5  # four standard errors
    np.testing.assert_allclose(interval_of_ratio(0.3 * y, y), 0.3)
    assert interval_of_ratio(0 * y, y) == (0, 0) and interval_of_ratio(y[:1], y[:1]) == (0, np.inf)


@pytest.mark.slow
def test_random_rules_are_judged_by_several_draws():
    """One draw of 16 directions is off by √((3 + 1) / 16) in the root mean square, as the rule's docstring has it."""
    make = lambda rule: outer_loss(QUADRATIC, rule, 5)  # noqa: E731
    found = compare(make, jnp.asarray(QUADRATIC.hparams), [ForwardGradient(16), Unroll(truncate=1)])
    line, sure = found.rows
    low, high = line.interval
    assert line.draws == 8 and low < 0.5 < high and low < line.relative_error < high
    mean = float(line.notes[-1].rpartition(" ")[2].rstrip("."))
    assert "judged by 8 draws" in line.notes[-1] and 0 < mean < line.relative_error / 2**0.5  # expected: / 8**0.5
    assert sure.draws == 1 and sure.interval == (sure.relative_error,) * 2 and "interval" in str(found)
    # Along two random directions of three an error is not exact.
    found = compare(
        make, jnp.asarray(QUADRATIC.hparams), [Unroll(truncate=1)], reference="differences", num_directions=2
    )
    low, high = found.rows[0].interval
    assert low <= found.rows[0].relative_error <= high


@pytest.mark.slow
def test_pairs_are_compared():
    """On the quadratic: from one start a pair is its rule; from the last one it takes ever more steps."""
    p, steps, h = QUADRATIC, 5, jnp.asarray(QUADRATIC.hparams)
    solver = jaxhpo.from_optax(p.train_loss, optax.sgd(p.step_size))

    def pair(method, warm_start):
        val = lambda solution, h, batch: p.val_loss(solution.params)  # noqa: E731
        made = jaxhpo.hypergradient(method, solver, val, num_steps=steps, warm_start=warm_start)
        return jaxhpo.from_pair(made), made.init(jnp.asarray(p.params), h)

    pairs = {"cold": pair(Unroll(), False), "warm": pair(Implicit(), True)}
    pairs["broken"] = (lambda h, carry, key: 1 / 0, None)
    found = compare(lambda rule: outer_loss(p, rule, steps), h, [Implicit()], pairs=pairs)
    cold, warm = found["cold"], found["warm"]
    assert cold.accurate and cold.first_error < 1e-12 and cold.draws == 1
    assert warm.first_error == pytest.approx(found["Implicit(CG(fallback=General()))"].relative_error, rel=1e-6)
    # The condition 2 (a − h) gives da/dh = 1, and the hypergradient 2 (a_T − target), against 2 (1 − ρ) (a_5 − target).
    end = lambda number: h + (1 - 2 * p.step_size) ** number * (p.params - h)  # noqa: E731
    target, rho = h - p.hypergradient(p.hparams) / 2, (1 - 2 * p.step_size) ** steps
    want = relative_error(2 * (end(6 * steps) - target), 2 * (1 - rho) * (end(steps) - target))
    assert warm.relative_error == pytest.approx(want, rel=1e-6) and "the 6th" in str(found)
    assert "ZeroDivisionError" in found["broken"].error and found.recommended == "cold"
    with pytest.raises(jaxhpo.JaxhpoError, match="another"):
        compare(lambda rule: outer_loss(p, rule, steps), h, {"cold": Unroll()}, pairs=pairs)


@pytest.mark.slow
def test_rules_are_compared_in_the_units_of_the_search():
    """With h = e^u all hypergradients are multiplied by h, so that the errors of the entries weigh otherwise."""
    p, h = QUADRATIC, jnp.exp(jnp.linspace(-4.0, 1.0, QUADRATIC.hparams.size))
    solver = jaxhpo.from_optax(p.train_loss, optax.sgd(p.step_size))
    val = lambda solution, h, batch: p.val_loss(solution.params)  # noqa: E731
    made = jaxhpo.hypergradient(Unroll(truncate=1), solver, val, num_steps=5, warm_start=False)
    pairs = {"pair": (jaxhpo.from_pair(made), made.init(jnp.asarray(p.params), h))}
    make = lambda rule: outer_loss(p, rule, 5)  # noqa: E731
    found = compare(make, h, [Unroll(truncate=1)], pairs=pairs, step=0.1, transforms=jaxhpo.positive, repeats=1)
    rough, exact = (h * jax.grad(make(rule))(h) for rule in (Unroll(truncate=1), Unroll()))
    for row in found.rows:
        assert row.relative_error == pytest.approx(relative_error(rough, exact), rel=1e-6)
        assert row.predictivity > 0.9


@pytest.mark.slow
def test_outer_loss_without_effect_or_not_finite_is_refused():
    make = lambda rule: outer_loss(QUADRATIC, rule, 5)  # noqa: E731
    with pytest.raises(jaxhpo.ZeroHypergradientError, match="no hyperparameter affects"):
        compare(lambda rule: lambda h: make(rule)(jnp.zeros(3)) + 0 * jnp.sum(h), jnp.ones(3), [Unroll()])
    with pytest.raises(jaxhpo.NonFiniteError, match="The outer loss is inf"):
        compare(lambda rule: lambda h: make(rule)(h) / 0, jnp.ones(3), [Unroll()])


@pytest.mark.slow
def test_command_prints_and_writes_the_comparison(tmp_path, capsys):
    out = tmp_path / "new"
    arguments = ["--problem", "hard", "--methods", "unroll,cg", "--num-steps", "12", "--seed", "3", "--out", str(out)]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "comparison.json").read_text())
    assert report["recommended"] == "Unroll()" and report["problem"]["num_steps"] == 12 and report["seed"] == 3
    assert [row["name"] for row in report["methods"]] == ["Unroll()", "Implicit(CG())"]
    assert "matrix factorisation" in printed and str(out / "comparison.png") in printed
    check_picture(out / "comparison.png")


@pytest.mark.slow
def test_picture_shows_every_row(tmp_path):
    rows = (row("good"), row("bad", error=0.5), row("lost", finite=False, relative_error=None), row("no", error=0.1))
    rows = (*rows, row("raised", gradients=None, relative_error=None, finite=None)._replace(error="no"))
    found = jaxhpo.Comparison(rows, EXACT, CONVERGED, "good", "Use it.")
    figure = plot.comparison(found, tmp_path / "picture.png")
    axis = figure.axes[0]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend[0] == "1  good = the reference, 10 copies" and legend[2:] == [
        "3  lost: not finite",
        "4  no, 10 copies",
        "5  raised: raised an error",
    ]
    assert [text.get_text() for text in axis.texts] == ["no error", "1", "2", "4"]
    markers = [points for points in axis.collections if len(points.get_sizes())]
    assert len(markers) == len(rows)
    assert not any(np.isclose(points.get_offsets()[:, 1], 0).any() for points in markers)
    assert axis.get_title() == "Recommended here: good"
    check_picture(tmp_path / "picture.png")


def check_picture(path):
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 800
        assert len(set(picture.convert("L").resize((64, 48)).tobytes())) > 10  # something is drawn


@pytest.mark.slow
def test_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("... pip install 'jaxhpo[demo]'")

    monkeypatch.setattr(plot, "figure", missing)
    assert main(["compare", "--problem", "ridge", "--out", str(tmp_path)]) == 1
    assert "pip install 'jaxhpo[demo]'" in capsys.readouterr().err
