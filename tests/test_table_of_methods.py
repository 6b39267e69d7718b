"""The registry of methods is whole, and the table of `docs/choose.md` is the one that it writes."""

import dataclasses
import json
import pathlib
import re

import lineax
import optax
import pytest
from _methods import METHODS, markdown

import jaxhpo

ROOT = pathlib.Path(__file__).parents[1]
MEASURED = json.loads((ROOT / "benchmarks/results/methods.json").read_text())["rows"]


def test_the_page_holds_the_table_of_the_registry():
    text = (ROOT / "docs" / "choose.md").read_text()
    found = re.search(r"<!-- methods: begin -->\n(.*?)\n<!-- methods: end -->", text, re.S)
    assert found.group(1) == markdown(MEASURED), "run `python benchmarks/methods.py --page docs/choose.md`"
    assert len({line.count("|") for line in found.group(1).splitlines()}) == 1  # as many cells in every row


def test_every_public_method_has_a_row():
    rules = {
        name
        for name, value in vars(jaxhpo).items()
        if dataclasses.is_dataclass(value) and (hasattr(value, "run") or hasattr(value, "pair") or _solves(value))
    }
    assert rules >= {"Unroll", "Reversible", "CG", "HOAG", "EvolutionStrategies"}  # the search above finds them
    missing = rules - {name for method in METHODS for name in method.names} - {"Auto"}  # which takes one of the others
    assert not missing


def _solves(value) -> bool:
    return value.__module__.startswith("jaxhpo._linear.")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.call)
def test_a_row_is_a_call_that_can_be_made(method):
    assert all(hasattr(jaxhpo, name) for name in method.names)
    functions = dict.fromkeys(("predict", "output_loss", "regulariser", "example_loss"), lambda *args: None)
    functions["regulariser"] = lambda params, hparams: None
    functions["predict"] = functions["example_loss"] = lambda params, hparams, batch: None
    functions["output_loss"] = lambda outputs, batch: None
    call = re.sub(r"^hypergradient\((.*), \.\.\..*\)$", r"\1", method.call)
    made = eval(call, vars(jaxhpo) | functions | {"optax": optax, "lineax": lineax})
    assert hasattr(made, "run") or hasattr(made, "pair")
