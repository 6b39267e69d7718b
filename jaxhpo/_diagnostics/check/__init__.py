"""`check_hypergradient`: compares a hypergradient with the exact derivative, and says why it differs."""
