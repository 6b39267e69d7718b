"""Link prediction in small synthetic knowledge graphs, and matrix completion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo.models import link_prediction as lp
from suite.problem import Problem, arrays, bilevel, by, full, minibatches

ENTITIES, RELATIONS = 30, 6


def graph(seed: int) -> tuple[np.ndarray, ...]:
    """Triples (subject, relation, object) that a random complex model of rank 3 scores highest, in three parts."""
    rng, rank = np.random.default_rng(seed), 3
    entities, relations = (rng.normal(size=(n, rank)) + 1j * rng.normal(size=(n, rank)) for n in (ENTITIES, RELATIONS))
    scores = np.einsum("sr,pr,or->spo", entities, relations, entities.conj()).real
    scores += 0.5 * rng.normal(size=scores.shape)
    known = rng.permutation(np.argwhere(scores > np.quantile(scores, 0.9))).astype(np.int32)
    return known[:300], known[300:400], known[400:]


def completion(title, model, tx, hparams, seed, *, weights, power, size=None, **settings) -> Problem:
    """Cross-entropy of subjects and objects; the loss on other triples leaves out the known ones.

    `weights(h)` are those of `lp.penalty`; with `size`, minibatches of that many triples.
    """
    parts, sizes = graph(seed), (ENTITIES, RELATIONS)
    known = np.concatenate(parts)
    train = lp.group(parts[0], *sizes) if size is None else jnp.asarray(parts[0])
    held_out = [(jnp.asarray(part), lp.masks(part, known, *sizes)) for part in parts[1:]]
    if size is not None:
        settings["batches"] = minibatches(train, seed, settings["num_steps"], size)

    def train_loss(params, h, batch):
        return lp.cross_entropy(model, params, batch) + lp.penalty(model, params, weights(h), batch, power)

    def loss(params, h, data):
        triples, masks = data
        return lp.cross_entropy(model, params, triples, masks=masks)

    params = model.init(jax.random.key(seed), *sizes)
    common = {"train_loss": train_loss, "loss": loss, "convex": False, "converged": False, "outer_rate": 0.1}
    return bilevel(title, by(tx), (train, *held_out), params, hparams, **common | settings)


def graph_distmult(seed: int) -> Problem:
    sizes = {"entities": ENTITIES, "relations": RELATIONS}
    return completion(
        "link prediction by DistMult and Adagrad, a penalty for every embedding",
        lp.DistMult(rank=16, scale=0.1),
        optax.adagrad(0.1, initial_accumulator_value=1e-10, eps=0.0),  # finite derivatives at a gradient of zero
        {name: full(np.log(1e-2), n) for name, n in sizes.items()},
        seed,
        weights=lambda h: jax.tree.map(jnp.exp, h),
        power=2,
        num_steps=50,
        step_size=0.5,
    )


def graph_complex(seed: int) -> Problem:
    return completion(
        "link prediction by ComplEx and Adam on minibatches, the weight of N3",
        lp.ComplEx(rank=16, scale=0.1),
        optax.adam(0.02, eps_root=1e-6),
        full(np.log(1e-3)),
        seed,
        weights=jnp.exp,
        power=3,
        size=60,
        num_steps=80,
        step_size=0.5,
    )


def factorisation(seed: int) -> Problem:
    r"""Matrix completion, a penalty for every row and column.

    .. math:: L = \tfrac12\sum_{ij \in \Omega} (UV^\top - M)_{ij}^2 + \tfrac12\sum_i e^{h_i}\|U_i\|^2
                  + \tfrac12\sum_j e^{h'_j}\|V_j\|^2
    """
    rng, rows, columns, rank = np.random.default_rng(seed), 20, 15, 3
    truth = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) / rank**0.5
    matrix = truth + 0.5 * rng.normal(size=truth.shape)
    part = rng.choice(3, size=truth.shape, p=(0.5, 0.25, 0.25))  # of each entry
    params = {"U": 0.3 * rng.normal(size=(rows, rank)), "V": 0.3 * rng.normal(size=(columns, rank))}

    def squares(params, h, data):
        observed, matrix = data
        return jnp.sum(observed * (params["U"] @ params["V"].T - matrix) ** 2)

    def train_loss(params, h, data):
        penalties = [jnp.sum(jnp.exp(h[name])[:, None] * params[name] ** 2) for name in params]
        return 0.5 * (squares(params, h, data) + sum(penalties))

    return bilevel(
        "matrix completion trained to convergence, a penalty for every row and column",
        by(optax.sgd(0.03, 0.9)),
        tuple(arrays((np.where(part == i, 1.0, 0.0), matrix)) for i in range(3)),
        arrays(params),
        {"U": full(np.log(0.5), rows), "V": full(np.log(0.5), columns)},
        train_loss=train_loss,
        loss=lambda params, h, data: squares(params, h, data) / jnp.sum(data[0]),
        num_steps=500,
        step_size=0.03,
        outer_rate=0.1,
        convex=False,
        converged=True,
    )


PROBLEMS = {
    "graph-distmult": graph_distmult,
    "graph-complex": graph_complex,
    "factorisation": factorisation,
}
