"""Compute demand: what a run needs and how long it takes, foretold without MPI from the code that will run."""
