"""The serial mathematics: networks, losses, schedules, optimizers, metrics; knows no MPI, files or clocks."""
