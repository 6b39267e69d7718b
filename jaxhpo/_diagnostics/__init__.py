"""Diagnosis of hypergradients: checks, comparisons, memory plans, and the origin of numbers that are not finite."""
