"""One file per program of the command line."""
