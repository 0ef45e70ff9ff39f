"""The stages of a dense block (Huang et al. 2017, arXiv 1608.06993) on the ops, forward and backward: one
buffer, statistics taken once per channel, one gradient buffer.

Every layer's last convolution writes its channels into their slice of one channels_last buffer, in the place
of a concatenation (as Tongcheng's Caffe layer did in 2017); a layer reads the channels before its own. Batch
statistics belong to a channel, not to who normalises it: they are taken when the channel is written, and
every later normalisation folds them with its own gamma, beta and eps. Normalisation and ReLU happen where the
next convolution loads (Jung et al. 2019, arXiv 1807.01702); nothing normalised is stored.

Backward, for a channel with mean mu, variance s^2 over M values: consumer l with r_l = (s^2 + eps_l)^-1/2 and
masked gradient g_l adds gamma_l r_l g_l to the gradient buffer G, and, if it used batch statistics, gamma_l
r_l sum(g_l) to A and gamma_l r_l^2 sum(g_l xhat_l) to B. When the producer needs it, the gradient is
G - (A + (x - mu) B)/M: the corrections of all consumers at once, applied where the producer's backward loads.
"""

from typing import NamedTuple

import torch

from gconv import packed, pointwise_conv
from gconv.batch_norm import (
    apply_into,
    bwd_apply,
    bwd_finish,
    bwd_reduce,
    constant_finish,
    fold,
    pool,
    pool_bwd,
    stats,
)
from gconv.grouped_conv import bwd, fwd_into, in_channels_last, wide
from gconv.memory import new_channels_last

POINTWISE = ((1, 1), *pointwise_conv.DENSE)  # (stride, padding, dilation, groups) of the 1x1 convolutions


class LayerConf(NamedTuple):
    """A layer's constants. The pairs are of its two normalisations; without a bottleneck there is one."""

    growth: int  # channels it adds
    bottleneck: bool
    dilation: int
    groups: int  # of the 3x3 convolution
    dropout: float  # probability; 0: none
    eps: tuple
    batch: tuple  # whether each normalises by the statistics of the batch

    @property
    def geometry(self) -> tuple:
        """(stride, padding, dilation, groups) of the 3x3 convolution, which keeps the size."""
        return (1, 1), (self.dilation, self.dilation), (self.dilation, self.dilation), self.groups

    @property
    def kept_scale(self) -> float:
        """What dropout multiplies by what it keeps."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0


class Conf(NamedTuple):
    """A block's constants."""

    channels: int  # of its input
    layers: tuple[LayerConf, ...]
    end: str  # what comes out: "buffer", "relu" of its normalisation, or "pool", that pooled and convolved
    eps: float  # of the normalisation at the end
    batch: bool  # whether it normalises by the statistics of the batch
    ultra: bool  # bottlenecks' outputs are computed again in the backward, not kept

    @property
    def starts(self) -> list[int]:
        """The channel where each layer's slice begins: the number of channels the layer reads."""
        starts = [self.channels]
        for layer in self.layers:
            starts.append(starts[-1] + layer.growth)
        return starts[:-1]

    @property
    def total(self) -> int:
        return self.channels + sum(layer.growth for layer in self.layers)

    @property
    def all_eps(self) -> list[float]:
        """Of each normalisation."""
        eps = [value for layer in self.layers for value in layer.eps]
        return eps if self.end == "buffer" else [*eps, self.eps]

    @property
    def geometries(self) -> list[tuple]:
        """(stride, padding, dilation, groups) of each convolution."""
        found = []
        for layer in self.layers:
            found += [POINTWISE] * layer.bottleneck + [layer.geometry]
        return found + [POINTWISE] * (self.end == "pool")

    @property
    def norms(self) -> int:
        return sum(1 + layer.bottleneck for layer in self.layers) + (self.end != "buffer")

    @property
    def convs(self) -> int:
        return sum(1 + layer.bottleneck for layer in self.layers) + (self.end == "pool")

    @property
    def shares_statistics(self) -> bool:
        """Whether anything normalises the buffer by the statistics of the batch."""
        return any(layer.batch[0] for layer in self.layers) or (self.end != "buffer" and self.batch)


class Params(NamedTuple):
    """A block's tensors, in the order of its convolutions and of its normalisations: of each layer the first
    and, with a bottleneck, the second, then those of the end.

    means and variances: running statistics of normalisations by constants, of shape [0] for the others.
    noises: bool [N, growth, H, W], what dropout keeps, of each layer that has dropout.
    """

    weights: list
    gammas: list
    betas: list
    means: list
    variances: list
    noises: list


class Kept(NamedTuple):
    """What a forward leaves for the backward and for the running statistics."""

    mean: torch.Tensor  # [C_total] of the buffer's channels; [0] if nothing shares them
    var: torch.Tensor
    tables: list  # [4, C] of each normalisation: a, b, mean, rstd
    ys: list  # raw outputs of the bottlenecks, unless ultra
    variances: list  # of the batch, of each bottleneck's output that is normalised by it


def _table(mean, var, gamma, beta, eps):
    rstd, affine = fold(mean, var, gamma, beta, eps)
    return torch.stack((affine[0], affine[1], mean, rstd))


class _Norms:
    """Walks through the normalisations in order."""

    def __init__(self, params: Params):
        self.rest = iter(zip(params.gammas, params.betas, params.means, params.variances))
        self.tables = []

    def next(self, by_batch, mean, var, eps):
        """The table [4, C] of the next one; mean and var those of the batch."""
        gamma, beta, constant_mean, constant_var = next(self.rest)
        mean, var = (mean, var) if by_batch else (constant_mean, constant_var)
        self.tables.append(_table(mean, var, gamma, beta, eps))
        return self.tables[-1]


def drop(y, noise, layer: LayerConf) -> None:
    """Dropout, in place, of what a layer wrote or of its gradient."""
    y.mul_(noise).mul_(layer.kept_scale)


def forward_stages(buffer, params: Params, conf: Conf, ranks):
    """(out, Kept). `buffer` [N, C_total, H, W], channels_last, has the input in its first channels; the rest
    of it is written. out is the buffer itself where conf.end says so."""
    norms, weights, noises = _Norms(params), iter(params.weights), iter(params.noises)
    ys, variances = [], []
    shared = conf.shares_statistics
    mean, var = (buffer.new_empty(conf.total if shared else 0, dtype=wide(buffer)) for _ in range(2))

    def take(begin, end, statistics):
        mean[begin:end], var[begin:end] = ranks.merge(*statistics)

    if shared:
        take(0, conf.channels, stats(buffer[:, : conf.channels]))
    for layer, start in zip(conf.layers, conf.starts):
        source, end = buffer[:, :start], start + layer.growth
        act = norms.next(layer.batch[0], mean[:start], var[:start], layer.eps[0])[:2]
        if layer.bottleneck:
            if layer.batch[1]:
                y, y_mean, y_var = pointwise_conv.fwd_stats(source, next(weights), (1, 1), act)
                y_mean, y_var = ranks.merge(y_mean, y_var)
                variances.append(y_var)
            else:
                y = pointwise_conv.fwd(source, next(weights), (1, 1), act, None, None, False)
                y_mean = y_var = None
            if not conf.ultra:
                ys.append(y)
            source, act = y, norms.next(layer.batch[1], y_mean, y_var, layer.eps[1])[:2]
        out = buffer[:, start:end]
        at_once = shared and layer.dropout == 0
        rest = (act, None, None, False, at_once, out)
        statistics = fwd_into(source, next(weights), *layer.geometry, *rest)
        if layer.dropout > 0:
            drop(out, next(noises), layer)
            statistics = stats(out) if shared else None
        if shared:
            take(start, end, statistics)
    kept = Kept(mean, var, norms.tables, ys, variances)
    if conf.end == "buffer":
        return buffer, kept
    act = norms.next(conf.batch, mean, var, conf.eps)[:2]
    if conf.end == "relu":
        return pointwise_relu(buffer, act), kept
    # Pooling and a 1x1 convolution commute: a quarter of the pixels to convolve.
    return pointwise_conv.fwd(pool(buffer, act), next(weights), (1, 1), None, None, None, False), kept


def pointwise_relu(x, affine):
    """relu(a*x + b) as a tensor of its own."""
    out = new_channels_last(x, x.shape)
    apply_into(x, affine, None, None, True, out)
    return out


def infer_stages(x, weights, affines, conf: Conf):
    """The output by constants alone, second normalisations in the epilogue of the 1x1 convolutions. weights,
    which may be `Packed`, and the normalisations' affines in their order."""
    n, _, h, w = x.shape
    buffer = new_channels_last(x, (n, conf.total, h, w))
    buffer[:, : conf.channels].copy_(x)
    weights, affines = iter(weights), iter(affines)
    for layer, start in zip(conf.layers, conf.starts):
        source, act = buffer[:, :start], next(affines)
        if layer.bottleneck:
            rest = (act, next(affines), None, True)
            source, act = packed.run_fwd(source, next(weights), *POINTWISE, *rest), None
        out = buffer[:, start : start + layer.growth]
        packed.run_fwd_into(source, next(weights), *layer.geometry, act, None, None, False, out)
    if conf.end == "buffer":
        return buffer
    act = next(affines)
    if conf.end == "relu":
        return pointwise_relu(buffer, act)
    return packed.run_fwd(pool(buffer, act), next(weights), *POINTWISE, None, None, None, False)


class _Corrections:
    """The gradient buffer's table [6, C_total] in the form `finish` has (batch_norm.h): what turns G into
    the gradient that a slice's producer sees. Consumers add to its rows of slopes and offsets."""

    def __init__(self, kept: Kept, conf: Conf, ranks):
        self.used, self.ranks = conf.shares_statistics, ranks
        if self.used:
            zero, one = torch.zeros_like(kept.mean), torch.ones_like(kept.mean)
            self.table = torch.stack((one, zero, zero, kept.mean, zero, one))
            self.per_value = -1.0 / ranks.count

    def add(self, channels, table, sums) -> None:
        """Of a consumer by batch statistics, with the sums of its masked gradient."""
        scale, rstd = table[0], table[3]
        self.table[2, :channels].addcmul_(scale, sums[0], value=self.per_value)
        self.table[1, :channels].addcmul_(scale * rstd, sums[1], value=self.per_value)

    def finish(self, begin, end):
        """The table of a slice whose consumers are all done; None if nothing is to be corrected."""
        if not self.used:
            return None
        table = self.table[:, begin:end].contiguous()
        table[1:3] = self.ranks.total(table[1:3])
        return table


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    weights: list
    gammas: list
    betas: list


def _end_backward(dz, buffer, params, kept, conf, wanted, corrections):
    """(G, gradients of the end's (weight, gamma, beta)), the latter as lists of at most one."""
    if conf.end == "buffer":
        gradient = new_channels_last(buffer, buffer.shape)
        gradient.copy_(dz)
        return gradient, [], [], []
    table, dweight = kept.tables[-1], []
    if conf.end == "relu":
        rest = (table[2], table[3], params.gammas[-1], table[:2])
        dgamma, dbeta, _, _ = bwd_reduce(dz, buffer, *rest, None, False)
        gradient, _ = bwd_apply(dz, buffer, constant_finish(table, masked=True), None, False)
        sums = (dbeta, dgamma)
    else:
        weight = params.weights[-1]
        n, channels, h, w = buffer.shape
        pooled = dz.new_zeros(1).expand(n, channels, h // 2, w // 2)
        layout = in_channels_last(weight)
        rest = (None, None, None, None)
        d, _, _ = pointwise_conv.bwd(dz, pooled, weight, (1, 1), *rest, True, False, False)
        gradient = new_channels_last(buffer, buffer.shape)
        sums, pooled = pool_bwd(d, buffer, table, wanted.weights[-1], gradient)
        dgamma, dbeta = sums[1], sums[0]
        if wanted.weights[-1]:
            dweight = pointwise_conv.bwd(dz, pooled, weight, (1, 1), *rest, False, True, layout)[1:2]
        dweight = list(dweight) or [None]
    if conf.batch:
        corrections.add(conf.total, table, sums)
    return gradient, dweight, [dgamma], [dbeta]


def backward_stages(dz, buffer, params: Params, kept: Kept, conf: Conf, wanted: Wanted, ranks):
    """(dx, dweights, dgammas, dbetas), what is not wanted None or anything."""
    corrections = _Corrections(kept, conf, ranks)
    gradient, dweights, dgammas, dbetas = _end_backward(dz, buffer, params, kept, conf, wanted, corrections)
    ends = conf.end == "pool", conf.end != "buffer"
    conv, norm = conf.convs - ends[0], conf.norms - ends[1]  # those of the layers not yet done
    ys = list(kept.ys)
    noises = list(params.noises)
    for layer, start in zip(reversed(conf.layers), reversed(conf.starts)):
        own = 1 + layer.bottleneck
        conv, norm = conv - own, norm - own
        before = wanted.x or any(wanted.weights[:conv])
        before = before or any(wanted.gammas[:norm]) or any(wanted.betas[:norm])
        want_weights = wanted.weights[conv : conv + own]
        want_norms = [a or b for a, b in zip(wanted.gammas[norm:], wanted.betas[norm : norm + own])]
        y = ys.pop() if layer.bottleneck and not conf.ultra else None
        noise = noises.pop() if layer.dropout > 0 else None
        if not (before or any(want_weights) or any(want_norms)):
            rest = [None] * own
            dweights, dgammas, dbetas = rest + dweights, rest + dgammas, rest + dbetas
            continue
        weights = params.weights[conv : conv + own]
        tables, gammas = kept.tables[norm : norm + own], params.gammas[norm : norm + own]
        source, end = buffer[:, :start], start + layer.growth
        dy, written = gradient[:, start:end], buffer[:, start:end]
        finish = corrections.finish(start, end)
        if noise is not None:
            dy = (
                dy.contiguous(memory_format=torch.channels_last).clone()
                if finish is None
                else (bwd_apply(dy, written, finish, None, False)[0])
            )
            drop(dy, noise, layer)
            finish = None
        if finish is None:
            written = None
        layouts = [in_channels_last(weight) for weight in weights]
        if layer.bottleneck:
            if y is None:
                y = pointwise_conv.fwd(source, weights[0], (1, 1), tables[0][:2], None, None, False)
            into_first = before or want_weights[0] or want_norms[0]
            through = into_first or want_norms[1]
            rest = (written, finish, tables[1], through, want_weights[1], layouts[1])
            d, dweight, sums = bwd(dy, y, weights[1], *layer.geometry, *rest)
            grads, sums_of = [None, dweight], [None, sums if through else None]
            if into_first:
                if layer.batch[1]:
                    _, _, finish = bwd_finish(
                        ranks.total(sums), tables[1][2], tables[1][3], gammas[1], ranks.count
                    )
                else:
                    finish = constant_finish(tables[1])
                rest = (y, finish, tables[0], gradient[:, :start], want_weights[0], layouts[0])
                grads[0], sums_of[0] = pointwise_conv.bwd_add(d, source, weights[0], (1, 1), *rest)
        else:
            through = before or want_norms[0]
            rest = (written, finish, tables[0], through, want_weights[0], layouts[0])
            d, dweight, sums = bwd(dy, source, weights[0], *layer.geometry, *rest)
            grads, sums_of = [dweight], [sums if through else None]
            if before:
                into = gradient[:, :start]
                scale = torch.stack((tables[0][0], torch.zeros_like(tables[0][0])))
                apply_into(d, scale, into, None, False, into)
        if layer.batch[0] and sums_of[0] is not None:
            corrections.add(start, tables[0], sums_of[0])
        dweights = grads + dweights
        dgammas = [None if sums is None else sums[1] for sums in sums_of] + dgammas
        dbetas = [None if sums is None else sums[0] for sums in sums_of] + dbetas
    dx = None
    if wanted.x:
        dx, source = gradient[:, : conf.channels], buffer[:, : conf.channels]
        finish = corrections.finish(0, conf.channels)
        # A tensor of its own: a view would keep the whole gradient buffer alive.
        dx = (
            dx.clone(memory_format=torch.channels_last)
            if finish is None
            else (bwd_apply(dx, source, finish, None, False)[0])
        )
    return dx, dweights, dgammas, dbetas
