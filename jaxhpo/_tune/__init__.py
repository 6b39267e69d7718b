"""The outer loop: the compiled step, the record of a run, and what of it is on disk."""
