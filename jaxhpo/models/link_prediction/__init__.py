"""Link prediction in knowledge graphs: models, losses, penalties with a weight per embedding, filtered ranks.

All are pure functions of `params`, a dict of tables with one row per entity or relation. To tune one penalty weight per
embedding of the Nations graph by the hypergradient:

    from jaxhpo.data import knowledge_graph
    from jaxhpo.models import link_prediction

    graph = knowledge_graph("nations")
    model = link_prediction.DistMult(rank=200)
    start = model.init(jax.random.key(0), *graph.sizes)
    train = link_prediction.group(graph.train, *graph.sizes)
    masks = link_prediction.masks(graph.validation, graph.known, *graph.sizes)

    def train_loss(params, weights, batch):
        fit = link_prediction.cross_entropy(model, params, train)
        return fit + link_prediction.penalty(model, params, weights, train)

    # Adagrad's sum of squares starts at 1e-10, as the derivative of its root at zero is infinite.
    solver = jaxhpo.from_optax(train_loss, optax.adagrad(0.1, initial_accumulator_value=1e-10, eps=0.0))

    def outer_loss(weights):
        params = jaxhpo.solve(solver, solver.init(start, weights), weights, num_steps=20).params
        return link_prediction.cross_entropy(model, params, graph.validation, masks=masks)

    weights = {name: jnp.full(n, 0.006) for name, n in zip(("entities", "relations"), graph.sizes)}
    result = jaxhpo.tune(outer_loss, weights, optax.adam(0.05), num_steps=60, transforms=jaxhpo.positive)

`link_prediction.ranks(model, params, graph.test, graph.triples).metrics()` measures the quality of a model.
"""

from jaxhpo.models.link_prediction._loss import Grouped, cross_entropy, group, minibatches, penalty
from jaxhpo.models.link_prediction._model import CP, ComplEx, DistMult, Model, TransE
from jaxhpo.models.link_prediction._rank import Metrics, Ranks, ranks
from jaxhpo.models.link_prediction._triples import masks

__all__ = ["CP", "ComplEx", "DistMult", "Grouped", "Metrics", "Model", "Ranks", "TransE"]
__all__ += ["cross_entropy", "group", "masks", "minibatches", "penalty", "ranks"]
