"""HOSVD of pyttb, in an interpreter of its own.

Usage: ``python hosvd_peer.py DATA.npz``. Every line of input is answered by a line ``done``:
``run`` decomposes, ``save PATH`` writes the result of the last run.
"""

import sys

import numpy as np
import pyttb


def main(path: str) -> None:
    """Serve until the input ends."""
    with np.load(path) as data:
        tensor = pyttb.tensor(np.asfortranarray(data["x"]))
        ranks = np.array(data["ranks"])
    result = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            result = pyttb.hosvd(tensor, tol=0.5, ranks=ranks, verbosity=0)
        elif result is not None:
            factors = {f"factor{k}": f for k, f in enumerate(result.factor_matrices)}
            np.savez(argument, weights=result.core.data, **factors)
        print("\ndone", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
