"""Derivative rules, one file each: frozen dataclasses with `run(problem) -> (final state, steps taken)`."""
