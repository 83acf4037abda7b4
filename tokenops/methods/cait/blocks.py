"""Blocks whose channels can be pruned: attention and MLP with masks, in place."""

from typing import Any

from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...nn import Attention
from ...nn.attention import part_of
from ...patching.dressing import dress_as
from ...patching.modules import plain_of

#: where a block has the soft masks of its channels, by their kind: of q and k, of v, and of the MLP's hidden ones
MASKS = {"qk": ("attn", "qk_mask"), "v": ("attn", "v_mask"), "hidden": ("mlp", "mask")}


class Mlp(TimmMlp):
    """timm's MLP, of whose hidden channels some can be masked; parameter names are timm's.

    Attributes:
        mask: ``(F,)``, None at first: soft mask of the hidden channels, behind activation and norm. A tensor set here
            is a buffer, an ``nn.Parameter`` learns; either is in the state dict from then on, so set one before loading
            it.
    """

    mask: Tensor | None

    @classmethod
    def from_timm(cls, mlp: Any) -> "Mlp":
        """The same MLP as a timm module (or one of this class), whose submodules it shares.

        Raises:
            TypeError: it is not timm's ``Mlp`` of linear layers.
        """
        if type(mlp) not in (TimmMlp, Mlp) or not isinstance(mlp.fc1, nn.Linear):
            raise TypeError(f"Mlp.from_timm takes timm.layers.Mlp of linear layers, but got {type(mlp).__name__}")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for name in ("fc1", "act", "drop1", "norm", "fc2", "drop2"):
            setattr(new, name, getattr(mlp, name))
        new.register_buffer("mask", getattr(mlp, "mask", None))
        new.training = mlp.training
        return new

    def forward(self, x: Tensor) -> Tensor:
        return project(self, hidden(self, x))


def hidden(mlp: Any, x: Tensor) -> Tensor:
    """Tokens ``(B, N, C)`` to the hidden channels ``(B, N, F)`` of timm's MLP, not masked yet."""
    return mlp.norm(mlp.drop1(mlp.act(mlp.fc1(x))))


def project(mlp: Any, h: Tensor) -> Tensor:
    """Hidden channels ``(B, N, F)``, masked where the MLP has a mask, to its result ``(B, N, C)``."""
    mask = getattr(mlp, "mask", None)
    return mlp.drop2(mlp.fc2(h if mask is None else h * mask.to(h.dtype)))


def compact_mlp(mlp: Mlp) -> None:
    """Take an MLP's masked hidden channels out of it, in place; ``mask`` is None then.

    Raises:
        ValueError: no channel is left, or a norm runs over them.
    """
    if mlp.mask is None:
        return
    mask = mlp.mask.detach()
    rows = mask.nonzero()[:, 0]
    if not len(rows):
        raise ValueError("the MLP's mask keeps no hidden channel")
    keep_hidden(mlp, rows, mask[rows])
    mlp.mask = None


def keep_hidden(mlp: Any, rows: Tensor, factors: Tensor | None = None) -> None:
    """Leave an MLP some hidden channels, each times its factor, in place; ValueError where a norm runs over all."""
    if len(rows) < mlp.fc1.out_features and not isinstance(mlp.norm, nn.Identity):
        raise ValueError("channels would be taken out of the MLP's norm over all of them")
    mlp.fc1, mlp.fc2 = part_of(mlp.fc1, rows), part_of(mlp.fc2, rows, factors, inputs=True)


def prunable(model: Any) -> Any:
    """Make channels of a timm VisionTransformer prunable, in place; names, weights and outputs stay.

    The attention of every block becomes `tokenops.nn.Attention`, an MLP of timm's an `Mlp`, both with masks; another
    MLP stays what it is. It may come before `tokenops.apply_patch` or behind it.

    Args:
        model: dense, or behind ``apply_patch(model, "cait")``.

    Returns:
        The model.

    Raises:
        TypeError: the model is another one, runs its blocks in a way of its own, or has blocks or attention of another
            kind (parallel blocks, post-norm, rotary positions, say). It is unchanged then.
    """
    check_model("prunable", model)
    parts = []
    for i, block in enumerate(model.blocks):
        if plain_of(block) is not Block:
            raise TypeError(f"prunable: block {i}: it must be timm's Block, but it is {type(block).__name__}")
        try:
            attn = block.attn if isinstance(block.attn, Attention) else Attention.from_timm(block.attn)
        except TypeError as error:
            raise TypeError(f"prunable: block {i}: {error}") from None
        parts.append((attn, Mlp.from_timm(block.mlp) if type(block.mlp) is TimmMlp else block.mlp))
    for block, (attn, mlp) in zip(model.blocks, parts):
        block.attn, block.mlp = dress_as(attn, block.attn), mlp
    return model


def blocks_of(model: Any) -> list[Any]:
    """The model's blocks, all of them prunable.

    Raises:
        TypeError: one is not.
    """
    blocks = list(getattr(model, "blocks", ()))
    for i, block in enumerate(blocks):
        if not isinstance(getattr(block, "attn", None), Attention) or type(block.mlp) is TimmMlp:
            raise TypeError(f"block {i} has no masks of its channels: prunable(model) comes first")
    if not blocks:
        raise TypeError(f"a model with blocks is needed, but {type(model).__name__} has none")
    return blocks


def check_model(name: str, model: Any) -> None:
    """TypeError in words unless a model is timm's, and runs all its blocks on all its tokens or those CAIT merges."""
    patch = getattr(model, "tokenops_patch", None)
    method = "cait" if patch is None else patch.method.name
    if getattr(type(model), "forward_features", None) is not VisionTransformer.forward_features or method != "cait":
        raise TypeError(
            f"{name} takes a timm VisionTransformer, dense or behind apply_patch(model, 'cait'), but got"
            f" {type(model).__name__}{'' if method == 'cait' else f' behind {method}'}"
        )
