"""The outer loop: the step, its compilation for runs and populations, the record of a run, and its directory."""
