"""Results that a step's backward makes again instead of keeping them: those of one elementwise pass over what
is kept anyway (recomputation: Chen et al. 2016, arXiv 1604.06174, here of the operations that cost next to
nothing).

Autograd saves as it always does; afterwards a saved tensor's `register_hooks` puts a recipe in its place.
Where saved tensors already have hooks (save_on_cpu, checkpointing, the user's own) those decide what is kept,
and function transforms and compilers see the Functions as they are.
"""

import weakref

import torch

from gconv.autograd import call, op, transformed

_apply_affine = op("batch_norm_apply")


class Versioned:
    """A tensor that a backward reads, with the version at which it was kept."""

    def __init__(self, tensor):
        self.tensor, self.version = tensor.detach(), tensor._version

    @property
    def unchanged(self) -> bool:
        return self.tensor._version == self.version

    def get(self):
        """The tensor; RuntimeError, as autograd's, if it was changed in place."""
        if not self.unchanged:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: {self.tensor.type()} {list(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


class Recomputed:
    """z = relu(a*y + b + shortcut), which `get` makes again, bit for bit.

    y [N, K, H, W], affine [2, K] = (a; b). shortcut: a tensor, a tensor with an affine of its own, or the
    recipe of a tensor.
    """

    def __init__(self, z, y, affine, shortcut, shortcut_affine=None):
        self._made = _identity(z)
        self._args = [
            Versioned(arg) if isinstance(arg, torch.Tensor) else arg
            for arg in (y, affine, shortcut, shortcut_affine)
        ]
        self._value = None

    def makes(self, x) -> bool:
        """Whether x, which is z or was made from it in place, holds what z held."""
        return _identity(x) == self._made

    def use(self, value) -> None:
        """`value`, which has the values of z and is kept anyway, serves until it is taken or changed."""
        self._value = Versioned(value)

    def get(self):
        """z, kept for the next call. Of a row of n recipes made of each other, which the backward needs from
        the last to the first, the one half way is kept too: the next calls begin there. So some log2(n) are
        there at once, and one is made that often at most (Chen et al., "recursion")."""
        missing, recipe = [], self
        while isinstance(recipe, Recomputed) and (recipe._value is None or not recipe._value.unchanged):
            missing.append(recipe)
            recipe = recipe._args[2]
        z = recipe._value.tensor if isinstance(recipe, Recomputed) else None
        half = (len(missing) + 1) // 2
        # No recursion: a network may have any number of blocks in a row.
        for left in reversed(range(len(missing))):
            recipe = missing[left]
            args = [z if isinstance(arg, Recomputed) else arg and arg.get() for arg in recipe._args]
            z = call(_apply_affine, *args, True)
            if left in (0, half):
                recipe.use(z)
        return z

    def take(self):
        """z, for the last who needs it."""
        z, self._value = self.get(), None
        return z


def _identity(x) -> tuple:
    return x.data_ptr(), x._version, x.shape, x.stride()


def _node_of(z):
    """The node of autograd's tape that made z; None where there is none or others look at the tape."""
    return z.grad_fn if not transformed() and type(z) is torch.Tensor else None


def _recipe_of(x) -> Recomputed | None:
    """The recipe that the node of x keeps, if it still makes x."""
    found = getattr(_node_of(x), "gconv_recipe", None)
    recipe = None if found is None else found()
    return recipe if recipe is not None and recipe.makes(x) else None


def _replace(saved, pack, unpack) -> bool:
    """Replaces a saved tensor by pack(tensor); False where it has hooks, whose owner decides."""
    try:
        saved.register_hooks(pack, unpack)
    except RuntimeError:
        return False
    return True


def forget_block(z, x, y, table, shortcut) -> None:
    """After z = relu(a*y + b + shortcut), whose node has saved x as the first tensor and z as the last, along
    with y and the rest: z is made again, and x where its node offers that.

    table [4, K] has the affine in its first rows. shortcut: "x", or the raw output and the table of the
    convolution in it. In the second case x stays kept: recipes made of each other, which are made all at
    once, so end where the size changes.
    """
    node = _node_of(z)
    if node is None:
        return
    known = _recipe_of(x)
    if shortcut == "x":
        recipe = Recomputed(z, y, table[:2], x if known is None else known)
    else:
        recipe = Recomputed(z, y, table[:2], shortcut[0], shortcut[1][:2])
    # Of all backwards that read z the one of its own node is the last.
    if not _replace(node._raw_saved_tensors[-1], lambda tensor: recipe, Recomputed.take):
        return
    node.gconv_recipe = weakref.ref(recipe)  # autograd lets go of what is saved after the backward
    if known is None:
        return
    if shortcut == "x":
        _replace(node._raw_saved_tensors[0], lambda tensor: known, Recomputed.get)
    else:
        known.use(x)
