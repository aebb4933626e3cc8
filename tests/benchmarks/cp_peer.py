"""CP-ALS of pyttb or pygenten, in an interpreter of their own.

Usage: ``python cp_peer.py NAME DATA.npz``. Every line of input is answered by a line ``done``:
``run`` decomposes, ``save PATH`` writes the factors of the last run.
"""

import sys

import numpy as np
import pyttb


def main(name: str, path: str) -> None:
    """Serve until the input ends."""
    with np.load(path) as data:
        tensor = pyttb.tensor(np.asfortranarray(data["x"]))
        start = [np.asfortranarray(data[f"factor{k}"]) for k in range(data["x"].ndim)]
        sweeps = int(data["sweeps"])
    rank = start[0].shape[1]
    result = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            init = pyttb.ktensor([f.copy(order="F") for f in start])
            if name == "pyttb":
                result, _, _ = pyttb.cp_als(
                    tensor, rank, stoptol=0.0, maxiters=sweeps, init=init, printitn=0
                )
            else:
                import pygenten

                result, _, _ = pygenten.cp_als(
                    tensor,
                    init=init,
                    rank=rank,
                    maxiters=sweeps,
                    tol=0.0,
                    printitn=0,
                    # By far its fastest on dense tensors.
                    mttkrp_method=pygenten.MttkrpPhan,
                )
        elif result is not None:
            factors = {f"factor{k}": f for k, f in enumerate(result.factor_matrices)}
            np.savez(argument, weights=result.weights, **factors)
        print("\ndone", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
