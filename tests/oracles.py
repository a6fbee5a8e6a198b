"""Every norm in NumPy, written from the papers' equations and sharing no code with the library.

All functions are for channels-last float64 arrays, and analytic in their inputs: given complex
numbers they continue, so that `gradient` differentiates them without cancellation.
"""

import itertools

import numpy as np

from normlab import Conv


def patches(x, w, linear):
    """The inputs that meet each unit, `[N, ..., groups, K]`, padding included."""
    if not isinstance(linear, Conv):
        return x[..., None, :]
    spatial = w.ndim - 2
    strides, dilation = (
        (v,) * spatial if isinstance(v, int) else v for v in (linear.strides, linear.dilation)
    )
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape, dilation, strict=False)]
    if linear.padding == "VALID":
        padding = [(0, 0)] * spatial
    elif linear.padding == "SAME":
        totals = [
            max((-(-size // s) - 1) * s + r - size, 0)
            for size, s, r in zip(x.shape[1:-1], strides, reach, strict=True)
        ]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = linear.padding
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    columns = []
    for offset in itertools.product(*map(range, w.shape[:spatial])):
        window = (
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offset, dilation, sizes, strides, strict=True)
        )
        columns.append(x[:, *window, :])
    p = np.stack(columns, -2)  # [N, ..., window, groups * K/window]
    p = p.reshape(*p.shape[:-1], linear.groups, -1)
    return np.moveaxis(p, -2, -3).reshape(*p.shape[:-3], linear.groups, -1)


def units(w, linear):
    """The kernel as one column per unit, `[groups, K, C/groups]`."""
    groups = linear.groups if isinstance(linear, Conv) else 1
    return np.moveaxis(w.reshape(-1, groups, w.shape[-1] // groups), 1, 0)


def product(p, u):
    """w·x, `[N, ..., C]`."""
    a = np.einsum("...gk,gkc->...gc", p, u)
    return a.reshape(*a.shape[:-2], -1)


def preactivation(x, w, linear):
    """The dense layer or the convolution itself."""
    return product(patches(x, w, linear), units(w, linear))


def standardized(a, axes, eps, weights=None):
    """(a − μ)/√(σ² + ε) over `axes`, with weights aligned with the leading axes of `a`."""
    w = np.ones(a.shape) if weights is None else weights
    w = np.broadcast_to(w.reshape(w.shape + (1,) * (a.ndim - w.ndim)), a.shape)
    n = w.sum(axes, keepdims=True)
    mu = (w * a).sum(axes, keepdims=True) / n
    var = (w * (a - mu) ** 2).sum(axes, keepdims=True) / n
    return (a - mu) / np.sqrt(var + eps)


def standardized_backward(dh, a, axes, eps):
    """dL/da of `standardized`: the chain rule of Ioffe & Szegedy (2015), section 3."""
    m = np.prod([a.shape[i] for i in axes])
    mu = a.mean(axes, keepdims=True)
    var = ((a - mu) ** 2).mean(axes, keepdims=True)
    root = np.sqrt(var + eps)
    dvar = (dh * (a - mu)).sum(axes, keepdims=True) * -0.5 * (var + eps) ** -1.5
    dmu = -(dh / root).sum(axes, keepdims=True)
    dmu += dvar * (-2 * (a - mu)).mean(axes, keepdims=True)
    return dh / root + dvar * 2 * (a - mu) / m + dmu / m


def batch(a, eps=1e-5, weights=None):
    """Ioffe & Szegedy 2015, algorithm 1."""
    return standardized(a, tuple(range(a.ndim - 1)), eps, weights)


def layer(a, axes=-1, eps=1e-5, weights=None):
    """Ba, Kiros & Hinton 2016, equation 3; `axes=None` for all axes but the examples'."""
    axes = tuple(range(1, a.ndim)) if axes is None else axes
    return standardized(a, axes, eps, weights)


def rms(a, axes=-1, eps=1e-5, weights=None):
    """Zhang & Sennrich 2019, equation 4, with ε under the root."""
    axes = tuple(range(1, a.ndim)) if axes is None else axes
    w = np.ones(a.shape) if weights is None else weights
    w = np.broadcast_to(w.reshape(w.shape + (1,) * (a.ndim - w.ndim)), a.shape)
    square = (w * a * a).sum(axes, keepdims=True) / w.sum(axes, keepdims=True)
    return a / np.sqrt(square + eps)


def group(a, groups, eps=1e-5, weights=None):
    """Wu & He 2018, equation 7."""
    w = np.ones(a.shape) if weights is None else weights
    w = np.broadcast_to(w.reshape(w.shape + (1,) * (a.ndim - w.ndim)), a.shape)
    split = (a.shape[0], -1, groups, a.shape[-1] // groups)
    return standardized(a.reshape(split), (1, 3), eps, w.reshape(split)).reshape(a.shape)


def instance(a, eps=1e-5, weights=None):
    """Ulyanov, Vedaldi & Lempitsky 2016, equation 4."""
    return standardized(a, tuple(range(1, a.ndim - 1)), eps, weights)


def length(v, axis):
    """‖v‖, kept analytic; the axis stays."""
    return np.sqrt((v * v).sum(axis, keepdims=True))


def weight(p, u, of="unit", bounded=False):
    """Salimans & Kingma 2016, equation 2 with g = 1: x·v/‖v‖; of one unit, or all together.

    Bounded, Hoffer et al. 2018: g is the length at the point where derivatives are taken.
    """
    one = length(u, 1 if of == "unit" else None)
    return product(p, u / one * (one.real if bounded else 1))


def weight_standardization(p, u, form="brock", eps=None):
    """Brock et al. 2021, equation 1 with γ = 1: (v − v̄)/(σ√K); with their, and others', ε."""
    u = u - u.mean(1, keepdims=True)
    square, size = (u * u).sum(1, keepdims=True), u.shape[1]
    if form == "qiao":  # torch.std_mean
        return product(p, u / (np.sqrt(square / (size - 1)) + (eps or 1e-5)))
    if form == "timm":  # F.batch_norm
        return product(p, u / np.sqrt(square / size + (eps or 1e-6)))
    least = square.real.min() if eps is None else eps
    return product(p, u / np.sqrt(np.where(square.real < least, least, square)))


def weight_init(t):
    """Salimans & Kingma 2016, equation 6: g = 1/σ[t], b = −μ[t]/σ[t] for t = x·v/‖v‖."""
    axes = tuple(range(t.ndim - 1))
    sd = t.std(axes)
    return 1 / sd, -t.mean(axes) / sd


def cosine(p, u, centred=False):
    """Luo et al. 2017, equations 2 (cosine) and 6 (centred: Pearson's correlation)."""
    if centred:
        p, u = p - p.mean(-1, keepdims=True), u - u.mean(1, keepdims=True)
    return product(p / length(p, -1), u / length(u, 1))


def gradient(f, *args, step=1e-40):
    """The derivatives of the number `f(*args)` by complex steps: exact to rounding.

    Im f(x + ih)/h has no difference in it, hence nothing that could cancel.
    """
    grads = []
    for i, arg in enumerate(args):
        grad = np.empty(arg.shape)
        for index in np.ndindex(arg.shape):
            moved = arg.astype(complex)
            moved[index] += 1j * step
            grad[index] = f(*args[:i], moved, *args[i + 1 :]).imag / step
        grads.append(grad)
    return tuple(grads)
