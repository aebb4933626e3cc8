"""Matrix completion: the low-rank matrix that has the observed entries."""
