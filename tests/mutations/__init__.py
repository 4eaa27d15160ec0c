"""A seeded campaign of damaged, hostile and merely odd inputs.

Every one gives the right result or a clear refusal.

    python -m tests.mutations --count 5000 --seed 0        all kinds of input
    python -m tests.mutations --kind films --count 200     one kind
    python -m tests.mutations --case films:17              one input again, with its traceback

Each input is made from the name of its kind and a seed, and runs in a worker process that is
watched: 20 s of processor time, 3 GB of memory, and no file, program or network outside what it
was given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own small models and folders
