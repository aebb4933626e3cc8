"""Products that are compiled, for arrays of NumPy: optional, for they need numba."""
