"""The training step of PyTorch on a GPU: eager, compiled, and each as a CUDA graph; asked for turns on standard input.

A line "CASE MODE STEPS" is answered with one JSON line: milliseconds a step. Samples are resident on the device, a step
gathers its rows there by a random permutation; AdamW is PyTorch's fused one. float32 masters with bf16 autocast stand
against our bf16. Modes: eager; compile; reduce-overhead (compiled, with the compiler's own graphs); graph (the whole
eager step captured once); compile-graph (the whole step with the compiled network captured once).
"""

import json
import sys
import time

import torch
from cases import CASES, Case, samples

MODES = ("eager", "compile", "reduce-overhead", "graph", "compile-graph")


class TorchStep:
    """One case in one mode."""

    def __init__(self, case: Case, mode: str, data: tuple[torch.Tensor, torch.Tensor]):
        torch.manual_seed(0)
        self.case, self.mode, (self.x, self.y) = case, mode, data
        layers: list[torch.nn.Module] = []
        for a, b in zip(case.sizes, case.sizes[1:], strict=False):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        network = torch.nn.Sequential(*layers[:-1]).cuda()
        binary = case.loss == "binary_cross_entropy"
        criterion = torch.nn.BCEWithLogitsLoss() if binary else torch.nn.CrossEntropyLoss()

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=case.precision == "bf16", cache_enabled=False):
                z = network(x)
            return criterion(z.float().squeeze(1), y) if binary else criterion(z.float(), y)

        graphs = mode in ("graph", "compile-graph")
        if mode in ("compile", "compile-graph"):
            loss_of = torch.compile(loss_of)
        if mode == "reduce-overhead":
            loss_of = torch.compile(loss_of, mode="reduce-overhead")
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True,
                                           capturable=graphs)
        self.loss_of, self.at = loss_of, 0
        self.order = torch.randperm(case.rows, device="cuda")
        self.run = self._capture() if graphs else self._step

    def _rows(self) -> torch.Tensor:
        if self.at + self.case.batch > self.case.rows:
            self.at = 0
        self.at += self.case.batch
        return self.order[self.at - self.case.batch:self.at]

    def _train(self, rows: torch.Tensor) -> None:
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss_of(self.x[rows], self.y[rows])
        loss.backward()
        self.optimizer.step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._train(self._rows())

    def _capture(self):
        rows = self._rows().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._train(rows)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._train(rows)

        def replay() -> None:
            rows.copy_(self._rows())
            graph.replay()
        return replay

    def time_ms(self, steps: int) -> float:
        """Return milliseconds a step over `steps` of them."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / steps


def first_step() -> None:
    """Take one eager step of the first case and say when it was done."""
    case = next(iter(CASES.values()))
    x, y = samples(case)
    step = TorchStep(case, "eager", (torch.from_numpy(x).cuda(), torch.from_numpy(y).long().cuda()))
    step.run()
    torch.cuda.synchronize()
    print(json.dumps({"done": time.time()}), flush=True)


def main() -> None:
    if sys.argv[1:] == ["first-step"]:
        first_step()
        return
    built, data = {}, {}
    for line in sys.stdin:
        name, mode, steps = line.split()
        case = CASES[name]
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        try:
            if data.get("name") != name:
                data, built = {}, {}
                torch.cuda.empty_cache()
                torch._dynamo.reset()
                x, y = samples(case)
                y = torch.from_numpy(y).cuda()
                data = {"name": name, "samples": (torch.from_numpy(x).cuda(),
                                                  y.float() if case.loss == "binary_cross_entropy" else y.long())}
            if mode not in built:
                begin = time.time()
                built[mode] = TorchStep(case, mode, data["samples"])
                built[mode].time_ms(5)
                print(json.dumps({"ready_s": time.time() - begin, "mode": mode}), file=sys.stderr, flush=True)
            answer = {"ms": built[mode].time_ms(int(steps))}
        except Exception as error:  # a mode that fails is a result, too
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
