"""Evaluation through gathered layers: as many turns on every rank, every sample once, the figures of one rank."""

from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlp.comm import open_exchange
from hpcmlp.data.samples import Batch
from hpcmlp.errors import DataError
from hpcmlp.nn.initializers import initialize
from hpcmlp.nn.losses import Loss
from hpcmlp.nn.network import Network, NetworkSpec
from hpcmlp.ops.host import HostOps
from hpcmlp.run.evaluation import evaluate_split
from hpcmlp.run.together import Entered, InTurns
from hpcmlp.sync.memory import buffer_elements
from hpcmlp.sync.sharded import open_sharded

SPEC = NetworkSpec((6, 8, 11, 3))
FACTS = SimpleNamespace(task="classification", classes=["a", "b", "c"], target_names=[], num_features=6, num_outputs=3,
                        x_dtype="float32", weighted=True, load_shift=None, load_scale=None, name="made up")


class Rows:
    """A loader over made-up samples: rank r visits its contiguous rows; `fails` after one batch."""

    def __init__(self, rows, rank, size, fails=False):
        random = np.random.default_rng(rows)
        self.x = random.standard_normal((rows, 6), dtype=np.float32)
        self.y, self.weight = random.integers(0, 3, rows).astype(np.int32), random.random(rows, dtype=np.float32)
        self.own = [rows * r // size for r in (rank, rank + 1)]
        self.num_rows, self.size, self.manifest, self.fails = rows, size, FACTS, fails

    def sequential(self, max_rows):
        for start in range(*self.own, max_rows):
            index = np.arange(start, min(start + max_rows, self.own[1]))
            yield Batch(len(index), start, self.num_rows, self.x, index, self.y[index], self.weight[index])
            if self.fails:
                raise DataError("a shard was taken away")


@pytest.mark.parametrize("rows, size, max_rows", [(1, 4, 8), (10, 3, 2), (10, 4, 3), (97, 5, 7), (8, 4, 2)])
def test_every_rank_takes_as_many_turns_and_every_row_once(rows, size, max_rows):
    turns, seen = [], []
    for rank in range(size):
        loader = InTurns(Rows(rows, rank, size), max_rows)
        batches = [(b.rows, b.index.tolist(), len(b.targets), len(b.weights)) for b in loader.sequential(max_rows)]
        assert all(n == len(index) == targets == weights for n, index, targets, weights in batches)
        turns.append((len(batches), loader.count))
        seen += [row for _, index, _, _ in batches for row in index]
    assert len(set(turns)) == 1 and turns[0][0] == turns[0][1]
    assert sorted(seen) == list(range(rows))


def test_an_error_waits_for_the_last_turn():
    loader, taken = InTurns(Rows(40, 1, 4, fails=True), 3), []
    with pytest.raises(DataError, match="taken away"):
        taken.extend(batch.rows for batch in loader.sequential(3))
    assert taken == [3, 0, 0, 0] and loader.count == 4


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["ring", "shared"])
@pytest.mark.parametrize("rows", [1, 2, 29])
def test_gathered_layers_give_the_figures_of_one_rank(comm, name, rows, topology, given_back):
    ops, loss = HostOps(), Loss("softmax_cross_entropy")
    first = initialize(SPEC, 3, "auto", np.float32)
    exchange = open_exchange(name, topology, sum(buffer_elements(SPEC)), np.float32, by_layer=True)
    given_back(exchange.collective)
    network, strategy = open_sharded(exchange, SPEC, comm.size, ops, 4)
    given_back(strategy, "finish")
    owned = np.zeros_like(strategy.params)
    for number, (start, stop) in enumerate(SPEC.layer_spans()):
        strategy.take_layer(number, first[start:stop], owned)
    turns = InTurns(Rows(rows, comm.rank, comm.size), 4)
    with strategy.showing(owned):
        found = evaluate_split(Entered(network, strategy, turns.count), ops, loss, turns, comm, FACTS, full=False)
    plain = evaluate_split(Network(SPEC, ops, 4, first), ops, loss, Rows(rows, comm.rank, comm.size), comm, FACTS,
                           full=False)
    assert found == plain and found["rows"] == rows
    if comm.rank == 0 and comm.size > 1:
        with pytest.raises(DataError):
            list(InTurns(Rows(30, 0, comm.size, fails=True), 4).sequential(4))
