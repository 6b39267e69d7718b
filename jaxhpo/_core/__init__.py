"""The ground: types, errors, pytrees, traced programs, checks, records. No optimiser is known here."""
