"""Write ops.npz: what PyTorch computes for the activations, losses, layer norm and optimizers of `hpcmlp.ops`.

Run with a Python that has torch, from any directory: python make_ops_oracle.py. The cases and their options are stored
beside the values as JSON (key `cases`), so that the tests read both from the file.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

ACTIVATIONS = {
    "identity": lambda z: z * 1.0,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "selu": functional.selu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}
ELEMENT_LOSSES = {
    "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
    "mean_squared": functional.mse_loss,
    "mean_absolute": functional.l1_loss,
    "huber": functional.huber_loss,
}
# name of the case: loss, options, sample weights
LOSSES = {
    "cross_entropy": ("softmax_cross_entropy", {}, False),
    "cross_entropy_weighted": ("softmax_cross_entropy", {}, True),
    "cross_entropy_smooth": ("softmax_cross_entropy", {"label_smoothing": 0.1}, True),
    "cross_entropy_classes": ("softmax_cross_entropy", {"class_weights": [0.5, 2.0, 1.0, 0.25, 3.0]}, False),
    "cross_entropy_all": (
        "softmax_cross_entropy", {"label_smoothing": 0.2, "class_weights": [0.5, 2.0, 1.0, 0.25, 3.0]}, True,
    ),
    "binary_cross_entropy": ("binary_cross_entropy", {}, False),
    "binary_cross_entropy_weighted": ("binary_cross_entropy", {}, True),
    "mean_squared": ("mean_squared", {}, False),
    "mean_squared_weighted": ("mean_squared", {}, True),
    "mean_absolute": ("mean_absolute", {}, True),
    "huber": ("huber", {}, False),
    "huber_delta": ("huber", {"delta": 0.3}, True),
}
# name of the case: our kernel, the class of torch.optim, its options
OPTIMIZERS = {
    "sgd": ("sgd", "SGD", {"lr": 0.1}),
    "sgd_momentum": ("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd_dampening": ("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd_nesterov": ("sgd", "SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": ("adam", "Adam", {"lr": 0.01}),
    "adam_decay": ("adam", "Adam", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": ("adam", "AdamW", {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.1}),
    "rmsprop": ("rmsprop", "RMSprop", {"lr": 0.01}),
    "rmsprop_momentum": ("rmsprop", "RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.7, "weight_decay": 0.05}),
    "adagrad": ("adagrad", "Adagrad", {"lr": 0.05}),
    "adagrad_decay": ("adagrad", "Adagrad", {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-4, "weight_decay": 0.05}),
}
STEPS = 5


def activations(rng, store):
    special = [0.0, -0.0, 15.0, -15.0, 30.0, -30.0, 1e-4, -1e-4, 0.46, 0.47, 5.6, -5.7]
    z = np.concatenate([rng.normal(size=30) * 2, special])
    da = rng.normal(size=z.size)
    store["activation/pre"], store["activation/da"] = z, da
    for name, function in ACTIVATIONS.items():
        pre = torch.tensor(z, requires_grad=True)
        out = function(pre)
        out.backward(torch.tensor(da))
        store[f"activation/{name}/out"] = out.detach().numpy()
        store[f"activation/{name}/dz"] = pre.grad.numpy()


def losses(rng, store):
    n, k = 7, 5
    logits, weights = rng.normal(size=(n, k)) * 3, rng.uniform(0.1, 2.0, size=n)
    labels, values = rng.integers(0, k, n).astype(np.int32), rng.uniform(0.0, 1.0, size=(n, k))
    for name, array in {"logits": logits, "weights": weights, "labels": labels, "values": values}.items():
        store[f"loss/{name}"] = array
    for case, (kind, options, weighted) in LOSSES.items():
        z = torch.tensor(logits, requires_grad=True)
        w = torch.tensor(weights if weighted else np.ones(n))
        if kind == "softmax_cross_entropy":
            class_weights = torch.tensor(options.get("class_weights", [1.0] * k), dtype=torch.float64)
            target = torch.tensor(labels, dtype=torch.int64)
            rows = functional.cross_entropy(
                z, target, weight=class_weights, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
            )
            weight_sum = (w * class_weights[target]).sum()
        else:
            rows = ELEMENT_LOSSES[kind](z, torch.tensor(values), reduction="none", **options).mean(dim=1)
            weight_sum = w.sum()
        total = (rows * w).sum()
        total.backward()
        store[f"loss/{case}/sums"] = np.array([total.item(), weight_sum.item()])
        store[f"loss/{case}/dlogits"] = z.grad.numpy()


def layer_norm(rng, store):
    x, dout = rng.normal(size=(5, 7)) * 3 + 2, rng.normal(size=(5, 7))
    gamma, beta = rng.normal(size=7), rng.normal(size=7)
    tensors = [torch.tensor(array, requires_grad=True) for array in (x, gamma, beta)]
    out = functional.layer_norm(tensors[0], (7,), tensors[1], tensors[2])
    out.backward(torch.tensor(dout))
    names = ("x", "gamma", "beta", "dout", "out", "dx", "dgamma", "dbeta")
    arrays = (x, gamma, beta, dout, out.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors))
    store.update({f"layer_norm/{name}": array for name, array in zip(names, arrays, strict=True)})


def optimizers(rng, store):
    p, g = rng.normal(size=31), rng.normal(size=(STEPS, 31))
    g[:, 5] = 0.0
    g[0, 6] = 0.0
    store["optimizer/p"], store["optimizer/g"] = p.astype(np.float32), g.astype(np.float32)
    for case, (_, kind, options) in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.float64):
            parameter = torch.nn.Parameter(torch.tensor(store["optimizer/p"], dtype=dtype))
            optimizer = getattr(torch.optim, kind)([parameter], foreach=False, **options)
            rows = []
            for step in range(STEPS):
                parameter.grad = torch.tensor(store["optimizer/g"][step], dtype=dtype)
                optimizer.step()
                rows.append(parameter.detach().numpy().copy())
            store[f"optimizer/{case}/{str(dtype)[6:]}"] = np.stack(rows)


def main():
    rng = np.random.default_rng(20261123)
    store = {}
    for part in (activations, losses, layer_norm, optimizers):
        part(rng, store)
    cases = {"activations": list(ACTIVATIONS), "losses": LOSSES, "optimizers": OPTIMIZERS, "torch": torch.__version__}
    store["cases"] = np.array(json.dumps(cases))
    np.savez_compressed(Path(__file__).with_name("ops.npz"), **store)


if __name__ == "__main__":
    main()
