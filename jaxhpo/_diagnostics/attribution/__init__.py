"""Data attribution: what each training example does to each test measurement, and whether retraining confirms it."""
