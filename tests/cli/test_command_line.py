"""The help of `jaxhpo`, its answers to misspelt words, and the look of its tables."""

import re
import runpy
import shlex
import sys

import pytest

from jaxhpo._cli import main as command_line
from jaxhpo._core.progress import text_table

COMMANDS = ("demo", "compare", "show", "plot")


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs the command with arguments that end it, 80 columns wide; returns its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        return stop.value.code, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_and_ends_with_examples_that_parse(command, told):
    code, text = told(*command, "--help")
    assert code == 0 and max(map(len, text.splitlines())) < 80
    examples = re.findall(r"^  jaxhpo (.*)$", text.partition("\nexamples:\n")[2], re.MULTILINE)
    assert examples
    for example in examples:
        parsed = command_line._parser().parse_args(shlex.split(example))
        assert parsed.name == shlex.split(example)[0] and (not command or parsed.name == command[0])


def test_help_names_every_command(told):
    _, text = told("--help")
    assert re.findall(r"^    (\w+) ", text, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("shwo runs/1", "Did you mean show?"),
        ("--verison", "Did you mean --version?"),
        ("demo --quik", "Did you mean --quick?"),
        ("demo --outer-step=3 --sed=3", "Did you mean --seed?"),
        ("compare --problem rigde", "Did you mean ridge?"),
        ("compare --problem ridge --methods unrol,cg", "Did you mean unroll?"),
        ("show runs/1 --row 3 --width=3", "unrecognized arguments: --width=3\n"),
        ("show runs/1 runs/2", "unrecognized arguments: runs/2\n"),
        ("", "name a COMMAND: demo, compare, show or plot"),
    ],
)
def test_what_is_near_is_named(arguments, said, told):
    code, text = told(*arguments.split())
    assert code == 2 and said in text
    command = next((word for word in arguments.split()[:1] if word in COMMANDS), "[-h]")
    assert text.startswith(f"usage: jaxhpo {command}")


def test_module_is_the_command(monkeypatch, told, capsys):
    _, text = told("show", "--help")
    monkeypatch.setattr(sys, "argv", ["__main__.py", "show", "--help"])
    monkeypatch.delitem(sys.modules, "jaxhpo.__main__", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("jaxhpo", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out == text


def test_a_table_has_a_head_a_rule_and_aligned_figures():
    rows = [("untuned", ["0.3", "1"]), ("hypergradient", ["0.25 ± 0.01", "2"])]
    assert text_table("method", ["loss", "accuracy"], iter(rows)) == [
        "method                loss  accuracy",
        "------------------------------------",
        "untuned                0.3         1",
        "hypergradient  0.25 ± 0.01         2",
    ]
