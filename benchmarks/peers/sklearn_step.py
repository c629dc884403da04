"""Time a training step of scikit-learn's MLPClassifier: `partial_fit` on one batch, gathered from resident samples.

The whole call is timed as a user pays it: checks of its input included. One process; Adam, ReLU, no L2 term; the BLAS
threads are those of OMP_NUM_THREADS and OPENBLAS_NUM_THREADS. See peer.py for how it is asked. Runs in the peers'
environment, which has no hpcmlp.
"""

import numpy as np
import sklearn
from peer import BATCHES, make_parser, samples, take_turns, time_steps
from sklearn.neural_network import MLPClassifier


def main() -> None:
    args = make_parser(__doc__).parse_args()
    x, y, index = samples(args.sizes, args.global_batch_size)
    network = MLPClassifier(tuple(args.sizes[1:-1]), alpha=0.0, batch_size=args.global_batch_size,
                            learning_rate_init=1e-4, random_state=0)
    classes = np.arange(args.sizes[-1])

    def step(number: int) -> None:
        batch = index[number % BATCHES]
        network.partial_fit(x[batch], y[batch], classes=classes)  # one step: the batch is batch_size

    time_steps(step, 3)
    about = {"peer": "scikit-learn", "version": sklearn.__version__, "processes": 1, "threads": args.threads,
             "dtype": str(network.coefs_[0].dtype)}
    take_turns(about, lambda count: time_steps(step, count))


if __name__ == "__main__":
    main()
