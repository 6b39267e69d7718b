"""Digests of a traced outer step, equal in every process that traces the same one."""

import dataclasses
import enum
import hashlib
import types
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from jaxhpo._core.processes import whole
from jaxhpo._tune.history import key_data
from jaxhpo._tune.step import OuterState

WHOLE = 4096  # entries: of larger arrays, so many evenly spaced ones are read


def digests(traced: Any, consts: Any, state: OuterState) -> dict[str, str]:
    """Returns digests of an outer step, and of its outer loss alone.

    The loss is what remains of the step's program where only value, hypergradient, carry and info are wanted: another
    optimiser has the same. Names, lines and addresses do not enter, nor do Python functions that a program calls back.

    Args:
      traced: of `Step.advance`, by `jit(...).trace`.
      consts: the values that the step closes over, where they are among its arguments, before the state.
      state: the first one.

    Returns:
      Those of the loss's `program`, its `constants` and the first `carry`, that of the whole `step`, and `jax`, the
      version.
    """
    closed = traced.jaxpr
    after, report = jax.tree.map(lambda _: False, traced.out_info)
    after = after._replace(carry=_all(after.carry))
    report = report._replace(value=True, hypergradient=_all(report.hypergradient), info=_all(report.info))
    loss, step = _Digest(), _Digest()
    jaxpr, used = dce_jaxpr(closed.jaxpr, jax.tree.leaves((after, report)))
    hoisted = jax.tree.leaves(consts)
    read = [x for x, u in zip(hoisted, used, strict=False) if u]
    return {
        "program": loss.program(jaxpr, closed.consts, read),
        "constants": loss.constants.hexdigest(),
        "carry": _hash(map(digest, jax.tree.leaves(state.carry))),
        "step": _hash([step.program(closed.jaxpr, closed.consts, hoisted), step.constants.hexdigest()]),
        "jax": jax.__version__,
    }


def loss_digests(closed: Any) -> dict[str, str]:
    """Returns digests of a traced outer loss: its `program`, its `constants`, and `jax`, the version."""
    loss = _Digest()
    return {
        "program": loss.program(closed.jaxpr, closed.consts),
        "constants": loss.constants.hexdigest(),
        "jax": jax.__version__,
    }


def changes(before: dict[str, str], here: dict[str, str]) -> tuple[str, bool]:
    """Returns what differs between `digests`, in words, and whether it is surely another outer loss."""
    words = {
        "program": "the outer loss is another",
        "constants": "data that the outer loss closes over are others",
        "carry": "the first carry is another (that of the checkpoint is taken)",
    }
    other = {name for name in before if before[name] != here[name]}
    found = [text for name, text in words.items() if name in other]
    if "jax" in other:
        why = ", which alone may be the reason" * ("program" in other)
        found.append(f"jax is {here['jax']}, was {before['jax']}{why}")
    return " and ".join(found), "constants" in other or ("program" in other and "jax" not in other)


def digest(x: Any) -> str:
    """Returns a digest of type, shape and entries of an array; of a large one, of entries that are spread evenly."""
    x = key_data(x)
    shape, size = np.shape(x), np.size(x)
    if size > WHOLE:
        places = np.unravel_index(np.arange(WHOLE) * (size - 1) // (WHOLE - 1), shape)
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            x = x.at[places].get(out_sharding=NamedSharding(x.sharding.mesh, PartitionSpec()))
        else:
            x = x[places]
    x = whole(x)
    return _hash([f"{x.dtype}{shape}", x.tobytes().hex()])


class _Digest:
    """Digest of programs.

    Attributes:
      constants: of the values that they close over, in the order of their first use.
    """

    def __init__(self):
        self.constants = hashlib.sha256()
        self._known: dict[int, str] = {}

    def program(self, jaxpr: Any, consts: Any = (), hoisted: Any = ()) -> str:
        """Returns the digest of what a jaxpr computes; variables are numbered as they appear.

        Its first arguments are constants, too, where their values are given (`hoisted`).
        """
        if id(jaxpr) not in self._known:
            values = dict(zip(jaxpr.constvars, consts, strict=False)) | dict(zip(jaxpr.invars, hoisted, strict=False))
            self._known[id(jaxpr)] = _hash(self._lines(jaxpr, values))
        return self._known[id(jaxpr)]

    def _lines(self, jaxpr, values):
        numbers = {v: i for i, v in enumerate(jaxpr.invars) if v not in values}

        def atom(x):
            if isinstance(x, jex.Literal):
                return f"{_kind(x.aval)} {np.asarray(x.val).tobytes().hex()}"
            if x not in numbers and x in values:
                self.constants.update(digest(values[x]).encode())
            return f"{numbers.setdefault(x, len(numbers))}"

        yield " ".join(_kind(v.aval) for v in jaxpr.invars)
        for eqn in jaxpr.eqns:
            ins = [atom(x) for x in eqn.invars]
            params = [f"{name}={self._text(x)}" for name, x in sorted(eqn.params.items()) if name != "name"]
            outs = [f"{atom(v)}:{_kind(v.aval)}" for v in eqn.outvars]
            yield " ".join([eqn.primitive.name, *ins, *params, *outs])
        yield " ".join(atom(x) for x in jaxpr.outvars)

    def _text(self, value) -> str:
        """Returns a parameter in words; of what may differ from process to process only the type."""
        kind = type(value).__name__
        if isinstance(value, jex.ClosedJaxpr):
            return self.program(value.jaxpr, value.consts)
        if isinstance(value, jex.Jaxpr):
            return self.program(value)
        if isinstance(value, (np.ndarray, jax.Array)):
            return digest(value)
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.dtype, np.generic, enum.Enum)):
            return repr(value)
        if isinstance(value, (types.FunctionType, type)):
            return value.__qualname__
        if isinstance(value, (tuple, list)):
            return f"{kind}({', '.join(map(self._text, value))})"
        if isinstance(value, (set, frozenset)):
            return f"{kind}({', '.join(sorted(map(self._text, value)))})"
        if isinstance(value, dict):
            return f"{kind}({', '.join(sorted(f'{name}: {self._text(x)}' for name, x in value.items()))})"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return kind + self._text({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        return kind


def _kind(aval) -> str:
    return f"{aval.dtype}{aval.shape}" if isinstance(aval, ShapedArray) else type(aval).__name__


def _hash(texts) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\n")
    return found.hexdigest()


def _all(tree):
    return jax.tree.map(lambda _: True, tree)
