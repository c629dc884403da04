"""Train, evaluate and use multi-layer perceptrons, data-parallel over MPI ranks."""

__version__ = "0.1.0"
