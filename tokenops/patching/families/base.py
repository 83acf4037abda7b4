"""The kinds of blocks that the engine knows: where each keeps its parts, and how its heads are made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...nn.attention import heads_of, packed, project
from ...nn.watched import keeps_forward
from ..modules import name_of, unwrapped
from ..positions import Positions
from .refused import why_refused

#: what to do where a patched model was changed since
PATCH_ANEW = "remove_patch, and apply_patch to the model as it is now"


#: the name of a norm that a kind of block does not have before its attention or its MLP
UNNORMED = "tokenops_unnormed"


def apart(attention: Any, x: Tensor) -> None:
    """In the place of `packed` where q, k and v do not come from one projection as they are."""


def padding(mask: Tensor | None, prefix: int) -> Positions | None:
    """What a mask ``(B, 1, rows, P+N)``, of booleans or to be added to the logits, hides from the first token."""
    if mask is None:
        return None
    first = mask[:, 0, 0]
    hidden = ~first if first.dtype == torch.bool else first <= torch.finfo(first.dtype).min / 2
    return Positions((), None, prefix, hidden)


class Family:
    """A kind of pre-norm block, timm's own. Classes stand for kinds, without instances, so blocks copy and pickle."""

    norm1: str = "norm1"
    #: "" where it is the block's own doing
    attention: str = "attn"
    norm2: str = "norm2"
    #: what a model may pass to a block behind the tokens, by position
    arguments: tuple[str, ...] = ("attn_mask", "is_causal")
    #: those of them that say where tokens are
    tables: tuple[str, ...] = ()
    #: dropout of attention weights and the factor of the logits, attributes of the attention
    dropout: str = "attn_drop"
    scale: str = "scale"
    #: the classes of its attention
    attentions: tuple[str, ...] = (
        "timm.layers.attention.Attention",
        "timm.models.vision_transformer.Attention",
        "tokenops.nn.attention.Attention",
    )
    parts: tuple[str, ...] = ("ls1", "drop_path1", "mlp", "ls2", "drop_path2")
    projections: tuple[str, ...] = ("qkv", "proj")
    #: whether the attention's own forward takes other positions than the block's own
    told: bool = True
    #: whether its heads are mixed, before and behind the softmax: the whole matrix is written then
    mixes: bool = False
    #: whether what follows the MLP's second layer is linear, so that what is merged before it is the same as behind it
    linear: bool = True
    #: whether images are packed in one sequence: what is left of them must be known behind the last block, too
    packs: bool = False
    #: whether attention on all tokens may be by our operator where that is the faster, other roundings and all
    swift: bool = True

    @classmethod
    def check(cls, block: Any) -> None:
        """TypeError in words where a block is not laid out as this kind's are."""
        attentions = [unwrapped(attention) for attention in cls.attentions_of(block)]
        for attention in attentions:
            if (name := name_of(attention)) not in cls.attentions:
                reason = why_refused([name]) or f"it must be {' or '.join(cls.attentions)}"
                raise TypeError(f"its attention is {name}, but {reason}")
        norms = [name for name in (cls.norm1, cls.norm2) if name != UNNORMED]
        missing = [name for name in (*norms, *cls.parts) if not hasattr(block, name)]
        for core in map(cls.core, attentions or [block]):
            missing += [
                name
                for name in (*cls.projections, cls.dropout, *([cls.scale] if cls.scale else []))
                if not hasattr(core, name)
            ]
        if missing:
            raise TypeError(f"it has no {', '.join(missing)}: it is that of another version")
        for module in (block, *attentions):
            if not keeps_forward(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward"):
                raise TypeError("its forward was replaced, by one that a patch would undo")

    @classmethod
    def attentions_of(cls, block: Any) -> list[Any]:
        """The attentions of a block, which are mostly one."""
        return [getattr(block, cls.attention, None)] if cls.attention else []

    @staticmethod
    def core(attention: Any) -> Any:
        """The module with the projections: the attention, or one within."""
        return attention

    @classmethod
    def factor(cls, attention: Any) -> float:
        """Of the logits."""
        return getattr(cls.core(attention), cls.scale)

    @staticmethod
    def mixed_logits(attention: Any, logits: Tensor) -> Tensor:
        """Mixtures of the heads' logits ``(B, H, rows, N)``, where heads are mixed."""
        return logits

    @staticmethod
    def mixed_weights(attention: Any, weights: Tensor) -> Tensor:
        """Mixtures of the heads' weights ``(B, H, rows, N)``, where heads are mixed."""
        return weights

    @staticmethod
    def unmasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments behind the tokens, without what stands for no mask."""
        return args, kwargs

    @classmethod
    def positions(cls, block: Any, given: dict[str, Any], prefix: int) -> Positions | None:
        """Where the patches are, of what a block or its attention is given by name."""
        tables = [given[name] for name in cls.tables if given.get(name) is not None]
        flat = [t for table in tables for t in (table if isinstance(table, tuple) else (table,))]
        return Positions(tuple(flat), None, prefix) if flat else None

    @classmethod
    def call(cls, attention: Any, x: Tensor, positions: Positions | None) -> Tensor:
        """The block's own attention, as it is."""
        return attention(x)

    @classmethod
    def asked(cls, attention: Any, x: Tensor, positions: Positions | None, ask: Any) -> Tensor:
        """The block's own attention, patched, which is asked for more."""
        out = attention(x, ask=ask, positions=positions)
        return out[0] if isinstance(out, tuple) else out

    @staticmethod
    def fused(attention: Any) -> bool:
        """Whether the attention's own forward runs torch's, which writes no matrix."""
        return attention.fused_attn

    @staticmethod
    def returned(out: Tensor) -> Any:
        """The attention's result as its own forward returns it."""
        return out

    @staticmethod
    def handed(out: Any) -> Any:
        """What a block hands on as its own forward returns it."""
        return out

    packed: Any = staticmethod(packed)
    project = staticmethod(project)

    @staticmethod
    def width(attention: Any) -> int:
        """Channels of the widest head of an attention."""
        return max(attention.head_dim, getattr(attention, "v_head_dim", 0))

    @staticmethod
    def heads(attention: Any, x: Tensor, ask: Any, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, rows, D)`` of the rows that are asked for, k and v ``(B, H, N, D)`` of all; keys that positions
        turn are shown before, to ``ask.look_at``.
        """
        return heads_of(attention, x, ask.rows)

    @classmethod
    def attend(cls, block: Any, normed: Tensor, run: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """What attention adds to the rows that are asked for; ``run`` is given one, and its tokens."""
        return cls.after_attention(block, run(cls.attentions_of(block)[0], normed))

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(block.ls1(y))

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(y))

    @classmethod
    def feed(cls, block: Any, x: Tensor, normed: Tensor) -> Tensor:
        """x plus the MLP of what the second norm makes of x."""
        return x + cls.after_mlp(block, block.mlp(normed))
