"""The activation functions and their derivatives as formulas over any array module.

Conventions of torch.nn.functional: leaky_relu slope 0.01, gelu exact (erf), elu alpha 1, softplus beta 1.
A derivative is taken from the output where that is enough, because then the pre-activation need not be kept;
gelu and silu (`NEEDS_PRE`) need the pre-activation. At the kink of relu and leaky_relu the left derivative is taken.
"""

import math
from typing import Any

Array = Any  # an array of the module `xp`
KINDS = ("identity", "relu", "leaky_relu", "gelu", "silu", "elu", "selu", "tanh", "sigmoid", "softplus")
NEEDS_PRE = frozenset({"gelu", "silu"})
LEAKY_SLOPE = 0.01
SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


def activate(xp: Any, kind: str, pre: Array) -> Array:
    """Return f(pre), same shape and dtype.

    Local.
    """
    return _FORWARD[kind](xp, pre)


def activate_backward(xp: Any, kind: str, da: Array, out: Array | None, pre: Array | None) -> Array:
    """Return da * f'(pre), from `out` = f(pre) or, for the kinds in `NEEDS_PRE`, from `pre`.

    Local.
    """
    return _BACKWARD[kind](xp, da, out, pre)


def sigmoid(xp: Any, x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow on either side.

    Local.
    """
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, e) / (1.0 + e)


def softplus(xp: Any, x: Array) -> Array:
    """Return log(1 + exp(x)) without overflow, exact also where PyTorch switches to x (x > 20).

    Local.
    """
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def erf(xp: Any, x: Array) -> Array:
    """Return the error function by the rational approximations of W. J. Cody, to rounding in float64.

    Local.

    References
    ----------
    W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969) 631-637.
    """
    y = xp.minimum(xp.abs(x), 6.0)  # erf is 1 to float64 rounding from 5.93 on
    square = y * y
    small = x * _ratio(square, _SMALL_TOP, _SMALL_BOTTOM)  # |x| <= 0.46875
    decay = xp.exp(-square)
    middle = 1.0 - decay * _ratio(y, _MIDDLE_TOP, _MIDDLE_BOTTOM)  # up to 4
    far = xp.maximum(y, 1.0)
    inverse = 1.0 / (far * far)
    large = 1.0 - decay / far * (_INV_SQRT_PI - inverse * _ratio(inverse, _LARGE_TOP, _LARGE_BOTTOM))
    return xp.where(y <= 0.46875, small, xp.copysign(xp.where(y <= 4.0, middle, large), x))


def _ratio(x, top, bottom):
    """Two polynomials in x, highest power first, one over the other."""
    above, below = top[0], bottom[0]
    for a, b in zip(top[1:], bottom[1:], strict=True):
        above = above * x + a
        below = below * x + b
    return above / below


_INV_SQRT_PI = 1.0 / math.sqrt(math.pi)
_SMALL_TOP = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3,
)
_SMALL_BOTTOM = (
    1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3,
)
_MIDDLE_TOP = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1, 2.98635138197400131e2,
    8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3,
)
_MIDDLE_BOTTOM = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)
_LARGE_TOP = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
    1.60837851487422766e-2, 6.58749161529837803e-4,
)
_LARGE_BOTTOM = (
    1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
    2.33520497626869185e-3,
)


def _gelu_backward(xp, da, out, pre):
    """Phi(z) + z phi(z)."""
    inside = xp.clip(pre, -40.0, 40.0)  # phi is 0 there, and the square cannot overflow
    return da * (0.5 * (1.0 + erf(xp, pre * SQRT_HALF)) + inside * (INV_SQRT_2PI * xp.exp(-0.5 * inside * inside)))


def _silu_backward(xp, da, out, pre):
    """s (1 + z (1 - s)) with s the sigmoid."""
    s = sigmoid(xp, pre)
    return da * (s * (1.0 + pre * (1.0 - s)))


_FORWARD = {
    "identity": lambda xp, z: z,
    "relu": lambda xp, z: xp.maximum(z, 0.0),
    "leaky_relu": lambda xp, z: xp.where(z > 0, z, LEAKY_SLOPE * z),
    "gelu": lambda xp, z: 0.5 * z * (1.0 + erf(xp, z * SQRT_HALF)),
    "silu": lambda xp, z: z * sigmoid(xp, z),
    "elu": lambda xp, z: xp.where(z > 0, z, xp.expm1(xp.minimum(z, 0.0))),
    "selu": lambda xp, z: SELU_SCALE * xp.where(z > 0, z, SELU_ALPHA * xp.expm1(xp.minimum(z, 0.0))),
    "tanh": lambda xp, z: xp.tanh(z),
    "sigmoid": sigmoid,
    "softplus": softplus,
}
_BACKWARD = {
    "identity": lambda xp, da, out, pre: da,
    "relu": lambda xp, da, out, pre: xp.where(out <= 0, 0.0, da),
    "leaky_relu": lambda xp, da, out, pre: xp.where(out <= 0, LEAKY_SLOPE * da, da),
    "gelu": _gelu_backward,
    "silu": _silu_backward,
    "elu": lambda xp, da, out, pre: xp.where(out > 0, da, da * (out + 1.0)),
    "selu": lambda xp, da, out, pre: da * xp.where(out > 0, SELU_SCALE, out + SELU_SCALE * SELU_ALPHA),
    "tanh": lambda xp, da, out, pre: da * (1.0 - out * out),
    "sigmoid": lambda xp, da, out, pre: da * (out * (1.0 - out)),
    "softplus": lambda xp, da, out, pre: da * -xp.expm1(-out),
}
