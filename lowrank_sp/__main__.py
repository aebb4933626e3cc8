"""``python -m lowrank_sp`` is the command ``lowrank-sp``."""

from lowrank_sp.cli import main

if __name__ == "__main__":
    main()
