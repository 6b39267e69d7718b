"""Every public name is documented, and every example in the package runs."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo

# What an example may use without importing it.
NAMES = {"jaxhpo": jaxhpo, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
# Third-party packages of the extras: a module that needs an absent one is skipped.
EXTRAS = {"flax", "sklearn", "matplotlib", "optuna", "pooch", "lineax", "optimistix"}

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "References")
