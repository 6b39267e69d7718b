"""Small flax models for examples and benchmarks. flax is imported only here."""

from jaxhpo.models._mlp import MLP as MLP
