"""Diagnosis of hypergradients: checks, comparisons, memory, numbers that are not finite."""
