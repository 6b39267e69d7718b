"""Linear solvers of A x = b, one file each: `(matvec, b, x0=None) -> (x, LinearInfo)`."""
