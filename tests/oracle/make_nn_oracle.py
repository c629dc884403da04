"""Make nn.npz: PyTorch's logits, gradients, optimizer trajectories and learning rates for small networks.

Run with a Python that has torch: python tests/oracle/make_nn_oracle.py. Everything is float64 on the CPU.
Arrays: network/<norm or plain>/{x, y, params}; network/<activation>/<plain, norm, residual or both>/{logits, grads};
optimizer/{x, y, params}; optimizer/<case> (steps, params) after each step; schedule/<case> (steps,).
Parameters and gradients are unpadded vectors, per layer: weight (out, in), bias, norm weight, norm bias.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZES = (5, 7, 7, 7, 3)
OPTIMIZER_SIZES = (4, 6, 3)
STEPS = 5
ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "selu": F.selu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "identity": lambda z: z,
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": (torch.optim.Adam, {}),
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw-decay": (torch.optim.AdamW, {"weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.7, "weight_decay": 0.1, "eps": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad-decay": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3}),
}


def parameters(sizes, norm, generator):
    """Random parameters as a list of layers: weight, bias and, in hidden layers with a norm, its weight and bias."""
    layers = []
    for layer, (d_in, d_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        shapes = [(d_out, d_in), (d_out,)] + ([(d_out,), (d_out,)] if norm and layer < len(sizes) - 2 else [])
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tensors[0] /= d_in**0.5
        if len(tensors) > 2:
            tensors[2] = 1.0 + 0.3 * tensors[2]
        layers.append([t.requires_grad_() for t in tensors])
    return layers


def forward(layers, x, f, residual=False):
    """Logits of the network."""
    for layer, (weight, bias, *norm) in enumerate(layers[:-1]):
        z = F.linear(x, weight, bias)
        if norm:
            z = F.layer_norm(z, z.shape[1:], *norm)
        x = f(z) + x if residual and layer > 0 and weight.shape[0] == weight.shape[1] else f(z)
    return F.linear(x, *layers[-1])


def flat(tensors):
    """One vector of many tensors."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy().copy()


def data(rows, sizes, generator):
    """Random samples and classes."""
    return (torch.randn((rows, sizes[0]), generator=generator, dtype=torch.float64),
            torch.randint(0, sizes[-1], (rows,), generator=generator))


def networks(store, generator):
    """Logits and gradients of the summed cross entropy, for every activation with and without norm and residual."""
    for norm in (False, True):
        layers = parameters(SIZES, norm, generator)
        x, y = data(6, SIZES, generator)
        tensors = [t for layer in layers for t in layer]
        place = "network/norm" if norm else "network/plain"
        store |= {f"{place}/x": x.numpy(), f"{place}/y": y.numpy().astype(np.int32), f"{place}/params": flat(tensors)}
        for kind, f in ACTIVATIONS.items():
            for residual in (False, True):
                logits = forward(layers, x, f, residual)
                grads = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), tensors)
                case = {(0, 0): "plain", (1, 0): "norm", (0, 1): "residual", (1, 1): "both"}[norm, residual]
                store[f"network/{kind}/{case}/logits"] = logits.detach().numpy()
                store[f"network/{kind}/{case}/grads"] = flat(grads)


def optimizers(store, generator):
    """Parameters after each of a few steps of full-batch training with learning rate 0.05."""
    layers = parameters(OPTIMIZER_SIZES, False, generator)
    tensors = [t for layer in layers for t in layer]
    x, y = data(8, OPTIMIZER_SIZES, generator)
    start = [t.detach().clone() for t in tensors]
    store |= {"optimizer/x": x.numpy(), "optimizer/y": y.numpy().astype(np.int32), "optimizer/params": flat(start)}
    for case, (rule, options) in OPTIMIZERS.items():
        with torch.no_grad():
            for t, first in zip(tensors, start, strict=True):
                t.copy_(first)
        optimizer, rows = rule(tensors, lr=0.05, **options), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(forward(layers, x, torch.tanh), y).backward()
            optimizer.step()
            rows.append(flat(tensors))
        store[f"optimizer/{case}"] = np.stack(rows)


def schedules(store):
    """Learning rates of 60 steps with a peak of 0.1."""
    torch_lr = torch.optim.lr_scheduler

    def warm(optimizer):
        return torch_lr.SequentialLR(optimizer, [
            torch_lr.LinearLR(optimizer, start_factor=0.1, total_iters=9),
            torch_lr.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.001)], milestones=[10])

    cases = {
        "step": lambda o: torch_lr.StepLR(o, step_size=13, gamma=0.5),
        "exponential": lambda o: torch_lr.ExponentialLR(o, gamma=0.93),
        "cosine": lambda o: torch_lr.CosineAnnealingLR(o, T_max=60, eta_min=0.001),
        "cosine-warmup": warm,
        "one_cycle": lambda o: torch_lr.OneCycleLR(o, max_lr=0.1, total_steps=60),
        "one_cycle-options": lambda o: torch_lr.OneCycleLR(o, max_lr=0.1, total_steps=60, pct_start=0.41,
                                                           div_factor=7.0, final_div_factor=50.0),
    }
    for case, make in cases.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        schedule, rates = make(optimizer), []
        for _ in range(60):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step() if len(rates) < 60 else None
        store[f"schedule/{case}"] = np.array(rates)


if __name__ == "__main__":
    arrays: dict[str, np.ndarray] = {}
    source = torch.Generator().manual_seed(0)
    networks(arrays, source)
    optimizers(arrays, source)
    schedules(arrays)
    np.savez_compressed(Path(__file__).with_name("nn.npz"), **arrays)
