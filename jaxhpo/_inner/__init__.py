"""The inner problem: its solver, one inner step, the loop over steps."""
