"""A small causal transformer in flax on sequences of Markov chains."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from suite.networks import decay, network
from suite.problem import Problem, bilevel, by, cross_entropies, full, minibatches

VOCABULARY, LENGTH = 16, 16


class Transformer(nn.Module):
    """Pre-normalised layers of causal attention and a network of four times the width."""

    vocabulary: int = VOCABULARY
    width: int = 16
    heads: int = 2
    layers: int = 1

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[1]
        position = self.param("position", nn.initializers.normal(0.02), (1, length, self.width))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + position
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(jax.nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Text(NamedTuple):
    """Sequences.

    Attributes:
      tokens: int32 (n, length + 1).
      source: int32 (n,), the chain that each was drawn from.
    """

    tokens: jax.Array
    source: jax.Array


def text(chains: np.ndarray, each: int, rng) -> Text:
    """Draw `each` sequences from every chain, (chains, vocabulary, vocabulary) of transition probabilities."""
    source = np.repeat(np.arange(len(chains)), each)
    tokens, cumulative = np.zeros((len(source), LENGTH + 1), np.int32), chains.cumsum(-1)
    tokens[:, 0] = rng.integers(0, VOCABULARY, len(source))
    for t in range(LENGTH):
        below = cumulative[source, tokens[:, t]] < rng.uniform(size=(len(source), 1))
        tokens[:, t + 1] = np.minimum(below.sum(1), VOCABULARY - 1)
    return Text(jnp.asarray(tokens), jnp.asarray(source, jnp.int32))


def chain(rng, count: int) -> np.ndarray:
    return rng.dirichlet(np.full(VOCABULARY, 0.1), (count, VOCABULARY))


def one_chain(seed: int, sequences: int) -> tuple[Text, Text, Text]:
    rng = np.random.default_rng(seed)
    truth = chain(rng, 1)
    return tuple(text(truth, count, rng) for count in (sequences, 100, 200))


def language_model(title, tx, parts, hparams, seed, *, penalty=None, weight=None, **settings) -> Problem:
    """Cross-entropy of the next token, with `weight(h, batch)` for each sequence, plus `penalty(params, h)`."""
    params, apply = network(Transformer(), seed, parts[0].tokens[:, :-1])

    def losses(params, data):
        return cross_entropies(apply(params, data.tokens[:, :-1]), data.tokens[:, 1:]).mean(-1)

    def train_loss(params, h, batch):
        each = losses(params, batch) * (weight(h, batch) if weight else 1.0)
        return each.mean() + (penalty(params, h) if penalty else 0.0)

    return bilevel(
        title,
        by(tx),
        parts,
        params,
        hparams,
        train_loss=train_loss,
        loss=lambda params, h, data: losses(params, data).mean(),
        step_size=0.02,
        convex=False,
        converged=False,
        **settings,
    )


def transformer_penalties(seed: int) -> Problem:
    parts = one_chain(seed, 64)
    shapes = network(Transformer(), seed, parts[0].tokens[:, :-1])[0]
    return language_model(
        "a transformer by Adam on few sequences, a penalty for every array of parameters",
        by_rate(0.01),
        parts,
        jax.tree.map(lambda x: full(np.log(1e-3)), shapes),
        seed,
        penalty=decay,
        num_steps=60,
        outer_rate=0.1,
    )


def transformer_schedule(seed: int) -> Problem:
    parts, steps = one_chain(seed, 100), 50
    return language_model(
        "a transformer by Adam, a rate for every step",
        lambda h: by_rate(lambda step: jnp.exp(h)[step]),
        parts,
        full(np.log(3e-3), steps),
        seed,
        num_steps=steps,
        outer_rate=0.1,
        batches=minibatches(parts[0], seed, steps, 32),
    )


def transformer_sources(seed: int) -> Problem:
    """Of 24 sources half are the chain that is validated on; the others are chains of their own."""
    rng, steps, sources = np.random.default_rng(seed), 60, 24
    truth = chain(rng, 1)
    mixed = np.concatenate([np.repeat(truth, sources // 2, 0), chain(rng, sources // 2)])
    parts = text(mixed, 6, rng), text(truth, 100, rng), text(truth, 200, rng)
    return language_model(
        "a transformer by Adam on sequences of 24 sources, a weight for every source",
        by_rate(0.01),
        parts,
        full(0.0, sources),
        seed,
        weight=lambda h, batch: sources * jax.nn.softmax(h)[batch.source],
        num_steps=steps,
        outer_rate=0.1,
        batches=minibatches(parts[0], seed, steps, 48),
    )


def by_rate(rate):
    return optax.adam(rate, eps_root=1e-6)


PROBLEMS = {
    "transformer-penalties": transformer_penalties,
    "transformer-schedule": transformer_schedule,
    "transformer-sources": transformer_sources,
}
