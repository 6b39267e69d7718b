"""Linear solvers, one file each: `(matvec, b, x0=None) -> (x, LinearInfo)`."""
