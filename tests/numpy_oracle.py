"""What the kernel tests on NumPy arrays share: storage types, guarded buffers and the definitions in float64.

Activations are [N, H, W, C]. Nothing here imports torch.
"""

import numpy as np

DTYPES = ("float32", "bfloat16", "float16")
EPSILON = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative rounding error
CANARY = 12345.0


def store(values, dtype):
    """values rounded to nearest even and stored as dtype; bfloat16 is held in uint16. A NaN stays a NaN."""
    with np.errstate(over="ignore"):
        if dtype == "float16":
            return np.asarray(values, np.float64).astype(np.float16)
        single = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def value(stored, dtype):
    """The float64 values of an array in storage."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def bits(array):
    """The array's bytes as integers, for comparisons that tell -0 from 0 and hold NaN equal to itself."""
    return np.ascontiguousarray(array).view({2: np.uint16, 4: np.uint32}[array.itemsize])


class Exact:
    """Arrays at their exact size, each on its own heap block: AddressSanitizer sees one element too far."""

    def __init__(self, dtype):
        self.dtype = dtype

    def activation(self, stored):
        return None if stored is None else np.array(stored, order="C")

    flat = table = activation

    def output(self, shape):
        return np.ascontiguousarray(store(np.full(shape, CANARY), self.dtype))

    flat_output = output

    def table_output(self, *shape):
        return np.full(shape, CANARY, np.float32)

    def check(self):
        pass


class Guarded:
    """Arrays inside wider buffers: NaN around inputs poisons what reads beyond, a canary around outputs shows
    what writes beyond. Activations keep a margin on every axis, so that no one stride serves all pixels."""

    MARGIN = ((1, 1), (1, 2), (2, 1), (3, 4))

    def __init__(self, dtype):
        self.dtype = dtype
        self.outputs = []

    def _inside(self, shape, margins, fill):
        wide = np.full([n + low + high for n, (low, high) in zip(shape, margins)], fill)
        return wide, tuple(slice(low, low + n) for n, (low, _) in zip(shape, margins))

    def _input(self, stored, margins):
        if stored is None:
            return None
        wide, inner = self._inside(
            stored.shape, margins, store(np.nan, self.dtype) if stored.itemsize == 2 else np.nan
        )
        wide = wide.astype(stored.dtype)
        wide[inner] = stored
        return wide[inner]

    def activation(self, stored):
        return self._input(stored, self.MARGIN)

    def flat(self, stored):
        if stored is None:
            return None
        return self._input(stored.reshape(-1), ((5, 7),)).reshape(stored.shape)

    table = flat

    def _output(self, shape, margins, fill):
        wide, inner = self._inside(shape, margins, fill)
        self.outputs.append((wide, inner))
        return wide[inner]

    def output(self, shape):
        return self._output(shape, self.MARGIN, store(CANARY, self.dtype)[()])

    def flat_output(self, shape):
        return self._output((int(np.prod(shape)),), ((5, 7),), store(CANARY, self.dtype)[()]).reshape(shape)

    def table_output(self, *shape):
        return self._output((int(np.prod(shape)),), ((5, 7),), np.float32(CANARY)).reshape(shape)

    def check(self):
        """Nothing around the outputs has changed."""
        for wide, inner in self.outputs:
            around = np.ones(wide.shape, bool)
            around[inner] = False
            fill = np.float32(CANARY) if wide.dtype == np.float32 else store(CANARY, self.dtype)
            assert (wide[around] == fill).all(), "a kernel wrote outside its output"


# ------------------------------------------------------------------------------------------- grouped_conv


def taps(shape, out_hw, stride, dilation):
    """(r, s, slice of the padded image that tap (r, s) meets) for the nine taps."""
    for r in range(3):
        for s in range(3):
            rows = slice(r * dilation[0], r * dilation[0] + (out_hw[0] - 1) * stride[0] + 1, stride[0])
            columns = slice(s * dilation[1], s * dilation[1] + (out_hw[1] - 1) * stride[1] + 1, stride[1])
            yield r, s, (slice(None), rows, columns)


def output_size(size, stride, pad, dilation):
    return tuple((size[i] + 2 * pad[i] - 2 * dilation[i] - 1) // stride[i] + 1 for i in range(2))


def padded(x, pad):
    return np.pad(x, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1]), (0, 0)))


def by_group(x, groups):
    """[..., C] as [groups, pixels, C/groups]."""
    return np.moveaxis(x.reshape(-1, groups, x.shape[-1] // groups), 1, 0)


def conv(x, weight, stride, pad, dilation, groups):
    out_hw = output_size(x.shape[1:3], stride, pad, dilation)
    k = weight.shape[0]
    w = weight.reshape(groups, k // groups, -1, 3, 3)
    out = np.zeros((groups, x.shape[0] * out_hw[0] * out_hw[1], k // groups))
    xp = padded(x, pad)
    for r, s, window in taps(x.shape, out_hw, stride, dilation):
        out += by_group(xp[window], groups) @ w[:, :, :, r, s].transpose(0, 2, 1)
    return np.moveaxis(out, 0, 1).reshape(x.shape[0], *out_hw, k)


def conv_bwd_input(dy, weight, input_shape, stride, pad, dilation, groups):
    _, h, width, c = input_shape
    w = weight.reshape(groups, weight.shape[0] // groups, -1, 3, 3)
    dx = padded(np.zeros(input_shape), pad)
    g = by_group(dy, groups)
    for r, s, window in taps(input_shape, dy.shape[1:3], stride, dilation):
        dx[window] += np.moveaxis(g @ w[:, :, :, r, s], 0, 1).reshape(*dy.shape[:3], c)
    return dx[:, pad[0] : pad[0] + h, pad[1] : pad[1] + width]


def conv_bwd_weight(dy, x, weight_shape, stride, pad, dilation, groups):
    k, per_group = weight_shape[:2]
    dw = np.zeros((groups, k // groups, per_group, 3, 3))
    xp = padded(x, pad)
    g = by_group(dy, groups).transpose(0, 2, 1)
    for r, s, window in taps(x.shape, dy.shape[1:3], stride, dilation):
        dw[:, :, :, r, s] = g @ by_group(xp[window], groups)
    return dw.reshape(weight_shape)


def act(x, table):
    """relu(a*x + b); a NaN stays."""
    z = table[0] * x + table[1]
    return np.where(z <= 0, 0.0, z)


def keep(z):
    """Where a ReLU lets a gradient pass."""
    return ~(z <= 0)


def finished(dy, y, table):
    """The gradient that reaches the convolution: A*(dy*[not a*y + b <= 0]) + B*(y - mean) + C."""
    slope, tilt, level, mean, a, b = table
    return slope * np.where(keep(a * y + b), dy, 0.0) + tilt * (y - mean) + level
