"""convert(model): gconv's kernels inside an existing model, in place and exactly undone by revert(model).

Nothing is replaced: a module changes its class to a subclass of its own, so names, parameters, state_dict
keys, hooks, mode and every reference to the module stay. Two kinds of module change:

- a plain nn.Conv2d with a 3x3 kernel becomes gconv.Conv2d;
- an nn.Sequential, or a residual block whose forward we know, runs its convolution + batch norm (+ residual)
  (+ ReLU) as one fused call, and a whole bottleneck as one chain. A block is known by the code of its
  forward, not by its name: torchvision's and timm's ResNet blocks and every copy of them. Dense blocks
  (`convert_dense`) run as one call, with the transition behind them where a Sequential holds both.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from gconv import backend
from gconv.bottleneck import not_chained
from gconv.bottleneck_modules import fuse_bottleneck_forward
from gconv.conv_bn_relu import fuse_modules_forward, not_plain_relu, watched
from gconv.convert_dense import (
    DenseForward,
    is_dense_block,
    kept_reason,
    labels,
    layers_of,
    run_with_transition,
    transitions_of,
)
from gconv.fingerprint import same_code
from gconv.layers import Conv2d, ConvBNReLU

# ----------------------------------------------------------------------------------------- the blocks we know


class Step(NamedTuple):
    """Child names of one convolution + batch norm + activation: `between` sits before the activation, `after`
    behind it; either may be absent, None or Identity."""

    conv: str
    bn: str
    act: str
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


class Block(NamedTuple):
    """A residual block: the forward that identifies it and its steps; the last step takes the shortcut."""

    forward: Callable
    steps: tuple[Step, ...]


def _torchvision_basic_block(self, x):
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out


def _torchvision_bottleneck(self, x):
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)
    out = self.relu(out)

    out = self.conv3(out)
    out = self.bn3(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out


def _timm_basic_block(self, x):
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.drop_block(x)
    x = self.act1(x)
    x = self.aa(x)

    x = self.conv2(x)
    x = self.bn2(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act2(x)

    return x


def _timm_bottleneck(self, x):
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.act1(x)

    x = self.conv2(x)
    x = self.bn2(x)
    x = self.drop_block(x)
    x = self.act2(x)
    x = self.aa(x)

    x = self.conv3(x)
    x = self.bn3(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act3(x)

    return x


BLOCKS = (
    Block(_torchvision_basic_block, (Step("conv1", "bn1", "relu"), Step("conv2", "bn2", "relu"))),
    Block(
        _torchvision_bottleneck,
        (Step("conv1", "bn1", "relu"), Step("conv2", "bn2", "relu"), Step("conv3", "bn3", "relu")),
    ),
    Block(
        _timm_basic_block,
        (
            Step("conv1", "bn1", "act1", between=("drop_block",), after=("aa",)),
            Step("conv2", "bn2", "act2", between=("se", "drop_path")),
        ),
    ),
    Block(
        _timm_bottleneck,
        (
            Step("conv1", "bn1", "act1"),
            Step("conv2", "bn2", "act2", between=("drop_block",), after=("aa",)),
            Step("conv3", "bn3", "act3", between=("se", "drop_path")),
        ),
    ),
)


def _block_of(cls: type) -> Block | None:
    """The block whose forward `cls` has, or None."""
    return next((block for block in BLOCKS if same_code(cls.forward, block.forward)), None)


# --------------------------------------------------------------------------------------------- fused forwards


def _is_plain_relu(module) -> bool:
    """True for an nn.ReLU that nobody watches: a hook on it must fire."""
    return not_plain_relu(module) is None


def _present(owner: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The children of these names that do something."""
    children = [getattr(owner, name, None) for name in names]
    return [child for child in children if child is not None and type(child) is not nn.Identity]


def _run_step(owner: nn.Module, step: Step, x, shortcut=None):
    conv, bn, act = getattr(owner, step.conv), getattr(owner, step.bn), getattr(owner, step.act)
    between = _present(owner, step.between)
    if step.conv not in owner._gconv_fused:
        y = bn(conv(x))
        fused_relu = False
    elif between:
        y = fuse_modules_forward(x, conv, bn, relu=False)
        fused_relu = False
    else:
        fused_relu = _is_plain_relu(act)
        y = fuse_modules_forward(x, conv, bn, shortcut, fused_relu)
        shortcut = None
    for module in between:
        y = module(y)
    if shortcut is not None:
        y = y + shortcut
    if not fused_relu:
        y = act(y)
    for module in _present(owner, step.after):
        y = module(y)
    return y


def _chain_reason(block: nn.Module) -> str | None:
    """Why a bottleneck's steps run one by one, or None."""
    for step in block._gconv_block.steps:
        if step.conv not in block._gconv_fused:
            return f"{step.conv}: kept"
        busy = _present(block, (*step.between, *step.after))
        if busy:
            return f"{step.conv}: a {type(busy[0]).__name__} follows"
        act = getattr(block, step.act)
        if not _is_plain_relu(act):
            return f"{step.act}: want a ReLU without hooks, got {type(act).__name__}"
    return None


def _projection(downsample: nn.Module | None) -> tuple | None:
    """(conv, bn) of a converted shortcut that is nothing else and that nobody watches, or None."""
    if not isinstance(downsample, _FusedSequential) or len(downsample) != 2 or watched(downsample):
        return None
    (conv_name, conv), (_, bn) = downsample._modules.items()
    return (conv, bn) if conv_name in downsample._gconv_fused else None


class _Fused:
    """Mixin of the classes that convert gives to blocks. `_gconv_base` is the class before, `_gconv_fused`
    (on the instance) the names of the convolutions that run fused and, in a Sequential, of the transitions
    that run with the dense block before them. The classes are made on demand, so pickle and deepcopy rebuild
    them from the class before."""

    _gconv_fused: tuple[str, ...] = ()  # a slice of a Sequential is made without it

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new_fused, (self._gconv_base,), *state)


class _FusedBlock(_Fused):
    def forward(self, x):
        if isinstance(x, torch.fx.Proxy):  # the graph keeps the block's own nodes
            return self._gconv_base.forward(self, x)
        *steps, last = self._gconv_block.steps
        if len(steps) == 2:
            reason = _chain_reason(self)
            if reason is None:
                layers = [(getattr(self, step.conv), getattr(self, step.bn)) for step in (*steps, last)]
                projection = _projection(self.downsample)
                other = projection is None and self.downsample is not None
                return fuse_bottleneck_forward(x, layers, projection, self.downsample(x) if other else None)
            not_chained(reason, x)
        out = x
        for step in steps:
            out = _run_step(self, step, out)
        return _run_step(self, last, out, x if self.downsample is None else self.downsample(x))


class _FusedSequential(_Fused):
    def forward(self, input):
        if isinstance(input, torch.fx.Proxy):
            return self._gconv_base.forward(self, input)
        children = list(self._modules.items())
        i = 0
        while i < len(children):
            name, module = children[i]
            if (
                name in self._gconv_fused
                and i + 1 < len(children)
                and _norm_reason(children[i + 1][1]) is None
            ):
                relu = i + 2 < len(children) and _is_plain_relu(children[i + 2][1])
                input = fuse_modules_forward(input, module, children[i + 1][1], None, relu)
                i += 3 if relu else 2
            elif (
                isinstance(module, DenseForward)
                and i + 1 < len(children)
                and children[i + 1][0] in self._gconv_fused
            ):
                input = run_with_transition(input, module, children[i + 1][1])
                i += 2
            else:
                input = module(input)
                i += 1
        return input


@functools.cache
def _fused_class(base: type) -> type:
    """The subclass of `base` (a known block or a Sequential) that runs fused."""
    block = _block_of(base)
    if is_dense_block(base):
        mixins = (_Fused, DenseForward)
    else:
        mixins = (_FusedSequential if block is None else _FusedBlock,)
    attributes = {"_gconv_base": base, "_gconv_block": block, "__doc__": base.__doc__}
    return type(f"Fused{base.__name__}", (*mixins, base), attributes)


def _new_fused(base: type) -> nn.Module:
    cls = _fused_class(base)
    return cls.__new__(cls)


# ------------------------------------------------------------------------------------------------- the report


@dataclasses.dataclass
class Entry:
    """What became of one convolution: `name` (with the batch norm and ReLU that run with it), `result`
    "fused", "gconv.Conv2d", "reverted" or "kept"; `reason` is why it was kept, or a remark."""

    name: str
    result: str
    reason: str = ""

    def __str__(self) -> str:
        if self.result == "kept":
            return f"{self.name} kept: {self.reason}"
        return f"{self.name} → {self.result}" + (f" ({self.reason})" if self.reason else "")


class Report:
    """One `Entry` per convolution, in the model's order: print it, iterate it, or read `fused`, `swapped`,
    `kept`."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries

    def _names(self, *results: str) -> list[str]:
        return [entry.name for entry in self.entries if entry.result in results]

    @property
    def fused(self) -> list[str]:
        return self._names("fused")

    @property
    def swapped(self) -> list[str]:
        return self._names("gconv.Conv2d")

    @property
    def kept(self) -> list[str]:
        return self._names("kept")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def to_dict(self) -> dict:
        return {"entries": [dataclasses.asdict(entry) for entry in self.entries]}

    def __str__(self) -> str:
        lines = [str(entry) for entry in self.entries]
        results = list(dict.fromkeys(entry.result for entry in self.entries))
        summary = ", ".join(f"{len(self._names(result))} {result}" for result in results)
        return "\n".join([*lines, summary or "no convolution found"])

    __repr__ = __str__


# ----------------------------------------------------------------------------------------- convert and revert


FILTERED = "filter_fn"
DENSE = "in one dense block"
DENSE_KEPT = "its dense block kept: "
FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def _norm_reason(bn) -> str | None:
    """Why the batch norm cannot be fused, or None. FrozenBatchNorm2d is torchvision's or a copy of it."""
    if type(bn) is nn.BatchNorm2d:
        return None
    if type(bn).__name__ == "FrozenBatchNorm2d" and set(bn._buffers) >= FROZEN_BUFFERS:
        return None
    return "no batch norm after it" if not isinstance(bn, nn.Module) else type(bn).__name__


def _conv_reason(conv: nn.Conv2d) -> str | None:
    """Why this convolution cannot run fused or on our kernels, whatever its kernel size; or None."""
    if nn.utils.parametrize.is_parametrized(conv):
        return "parametrized"
    if type(conv) is not nn.Conv2d and type(conv) is not Conv2d:
        return f"{type(conv).__name__} is not torch.nn.Conv2d"
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return "its forward was replaced"
    if conv.kernel_size == (3, 3):
        return backend.geometry_reason(conv.stride, conv.padding, conv.dilation)
    return None


def _swap_reason(conv: nn.Conv2d) -> str | None:
    """Why this convolution does not become a gconv.Conv2d, or None."""
    return _conv_reason(conv) or _kernel_reason(conv)


def _kernel_reason(conv: nn.Conv2d) -> str | None:
    """Why torch runs this convolution, fused or not, or None."""
    geometry = (conv.stride, conv.padding, conv.dilation, conv.kernel_size, conv.groups)
    reason = backend.kernel_size_reason(conv.kernel_size) or backend.geometry_reason(*geometry)
    if reason is None and backend.dense_to_torch(conv.groups, conv.in_channels, conv.kernel_size):
        reason = "dense: torch runs it faster"
    return reason


def _class_before(module: nn.Module) -> type:
    """The class of `module` before it was converted."""
    return getattr(type(module), "_gconv_base", type(module))


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and _class_before(module).forward is nn.Sequential.forward


def _runs(module: nn.Module) -> list[tuple[str, str, str]]:
    """(conv, bn, relu or "") of everything in `module` that could run fused; [] if its forward is not one we
    know."""
    if "forward" in module.__dict__:
        return []
    if _is_sequential(module):
        children = [*module._modules.items(), ("", None), ("", None)]
        return [
            (name, bn_name, relu_name if _is_plain_relu(relu) else "")
            for (name, conv), (bn_name, bn), (relu_name, relu) in zip(children, children[1:], children[2:])
            if isinstance(conv, nn.Conv2d) and "norm" in type(bn).__name__.lower()
        ]
    block = _block_of(_class_before(module))
    if block is None:
        return []
    return [
        (
            s.conv,
            s.bn,
            s.act if not _present(module, s.between) and _is_plain_relu(getattr(module, s.act)) else "",
        )
        for s in block.steps
        if isinstance(getattr(module, s.conv, None), nn.Conv2d)
    ]


def _runs_fused_itself(module: nn.Module) -> bool:
    """True for ConvBNReLU, for the models and blocks of gconv.models and for dense blocks and transitions,
    unless those were asked to be stock or naive."""
    home = type(module).__module__
    if home == "gconv.dense_layers":
        return getattr(module, "memory", "naive") != "naive"
    ours = isinstance(module, ConvBNReLU) or home.startswith("gconv.models.")
    return ours and not getattr(module, "stock", False)


def _chained(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that a converted bottleneck runs as one chain; [] for any other module."""
    if not isinstance(module, _FusedBlock) or len(module._gconv_block.steps) != 3 or _chain_reason(module):
        return []
    convs = [getattr(module, step.conv) for step in module._gconv_block.steps]
    if [conv.kernel_size for conv in convs] != [(1, 1), (3, 3), (1, 1)]:
        return []
    if any(conv.bias is not None for conv in convs):
        return []
    if backend.dense_to_torch(convs[1].groups, convs[1].in_channels):
        return []
    projection = _projection(module.downsample)
    return convs if projection is None else [*convs, projection[0]]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _convert_dense(prefix: str, block: nn.Module, ask, entries: dict[int, Entry]) -> None:
    """Makes a dense block that we know one call, the whole of it or nothing, and notes it under the id of
    each convolution."""
    if "forward" in block.__dict__ or not is_dense_block(_class_before(block)):
        return
    layers = layers_of(block)
    convs = {name: child for name, child in block.named_modules() if isinstance(child, nn.Conv2d)}
    found = ((name, _conv_reason(conv)) for name, conv in convs.items())
    reason = next((f"{name}: {why}" for name, why in found if why), None) or kept_reason(block, layers)
    refused = []
    if reason is None and not isinstance(block, _Fused):
        refused = [name for name, conv in convs.items() if not ask(_join(prefix, name), conv)]
    if refused:
        reason = f"{refused[0]}: {FILTERED}"
    for name, conv in convs.items():
        if reason is None:
            layer, _, child = name.rpartition(".")
            entry = Entry(_join(prefix, f"{layer}.{labels(layers)[child]}"), "fused", DENSE)
        else:
            why = FILTERED if name in refused else f"{DENSE_KEPT}{reason}"
            entry = Entry(_join(prefix, name), "kept", why)
        entries[id(conv)] = entry
    if reason is None and not isinstance(block, _Fused):
        block.__class__ = _fused_class(type(block))
        block._gconv_layers = layers


def _convert_runs(prefix: str, module: nn.Module, ask, entries: dict[int, Entry]) -> None:
    """Fuses what can be fused inside one block or Sequential and notes it under the id of each
    convolution."""
    fused = set(module.__dict__.get("_gconv_fused", ()))
    for conv_name, bn_name, relu_name in _runs(module):
        conv, bn = getattr(module, conv_name), getattr(module, bn_name)
        name = _join(prefix, conv_name)
        reason = _conv_reason(conv) or _norm_reason(bn)
        if reason is None and conv_name not in fused and not ask(name, conv):
            reason = FILTERED
        if reason is not None:
            entries[id(conv)] = Entry(name, "kept", reason)
            continue
        fused.add(conv_name)
        label = "+".join(filter(None, (name, bn_name, relu_name)))
        ours = _kernel_reason(conv) is None
        kernel = f"{conv.kernel_size[0]}x{conv.kernel_size[1]}"
        entries[id(conv)] = Entry(label, "fused", "" if ours else f"torch's {kernel} convolution")
    for name, transition in transitions_of(module) if _is_sequential(module) else ():
        whole, conv = _join(prefix, name), transition.conv
        if name in fused or ask(f"{whole}.conv", conv):
            fused.add(name)
            parts = "+".join(part for part in transition._modules if part != "pool")
            entries[id(conv)] = Entry(f"{whole}.{parts}", "fused", DENSE)
        else:
            entries[id(conv)] = Entry(f"{whole}.conv", "kept", FILTERED)
    if fused:
        if not isinstance(module, _Fused):
            module.__class__ = _fused_class(type(module))
        module._gconv_fused = tuple(sorted(fused))


def _convert_conv(name: str, conv: nn.Conv2d, ask, entry: Entry | None) -> Entry:
    """Makes one convolution a gconv.Conv2d where our kernels cover it; returns its line of the report.

    `entry` is what `_convert_runs` noted for it.
    """
    fused = entry is not None and entry.result == "fused"
    if entry is not None and entry.reason == FILTERED:
        return entry
    shown = name or type(conv).__name__
    if type(conv) is Conv2d:
        return entry if fused else Entry(shown, "gconv.Conv2d", "already")
    reason = _swap_reason(conv)
    if reason is None and not ask(name, conv):
        reason = FILTERED
    if reason is not None:
        return entry or Entry(shown, "kept", reason)
    conv.__class__ = Conv2d
    conv._gconv_converted = True
    if fused:
        return entry
    remark = "" if entry is None else entry.reason
    if remark and not remark.startswith(DENSE_KEPT):
        remark = f"its batch norm kept: {remark}"
    return Entry(shown, "gconv.Conv2d", remark)


def _check_model(function: str, model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model: want a torch.nn.Module, got {type(model).__name__}")


def convert(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Puts gconv's kernels into `model`, in place; names, parameters, state_dict keys, hooks and mode stay.
    torch.compile and torch.export take the converted model, torch.fx sees the blocks' own nodes; TorchScript
    needs `revert` first. What a dense block returns is then a buffer that its backward reads: changing it in
    place makes the backward raise.

    Args:
        model: any module; also a single convolution. Converting twice changes nothing more.
        filter_fn: `filter_fn(name, conv) -> bool`, asked for each convolution that would change; False keeps
            it.

    Returns:
        a report, one line per convolution (one for each part that was gconv's already): print it.

    Raises:
        TypeError: `model` is no module, or `filter_fn` cannot be called.
    """
    _check_model("convert", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"convert: filter_fn: want a function (name, module) -> bool, got {type(filter_fn).__name__}"
        )
    answers: dict[int, bool] = {}

    def ask(name: str, conv: nn.Module) -> bool:
        if id(conv) not in answers:
            answers[id(conv)] = filter_fn is None or bool(filter_fn(name, conv))
        return answers[id(conv)]

    modules = list(model.named_modules())
    ready = [module for _, module in modules if _runs_fused_itself(module)]
    inside = {id(child) for module in ready for child in module.modules() if child is not module}
    entries: dict[int, Entry] = {}
    for change in (_convert_dense, _convert_runs):
        for name, module in modules:
            if id(module) not in inside and not _runs_fused_itself(module):
                change(name, module, ask, entries)
    for _, module in modules:
        for conv in _chained(module):
            entries[id(conv)].reason = "in one chain"
    report = []
    for name, module in modules:
        if id(module) in inside:
            continue
        if _runs_fused_itself(module):
            report.append(Entry(name or type(module).__name__, "fused", "already"))
        elif isinstance(module, nn.Conv2d):
            report.append(_convert_conv(name, module, ask, entries.get(id(module))))
    return Report(report)


def revert(model: nn.Module) -> Report:
    """Undoes `convert` exactly, in place, also in a copy or an unpickled model. Layers made as gconv's stay.

    Returns:
        a report, one line per module that got its class back.

    Raises:
        TypeError: `model` is no module.
    """
    _check_model("revert", model)
    report = []
    for name, module in model.named_modules():
        if isinstance(module, _Fused):
            module.__class__ = module._gconv_base
            for attribute in ("_gconv_fused", "_gconv_layers"):
                module.__dict__.pop(attribute, None)
        elif "_gconv_converted" in module.__dict__:
            if type(module) is not Conv2d:
                report.append(Entry(name, "kept", f"it became {type(module).__name__} after convert"))
                continue
            module.__class__ = nn.Conv2d
            del module._gconv_converted
        else:
            continue
        report.append(Entry(name or type(module).__name__, "reverted", type(module).__name__))
    return Report(report)
