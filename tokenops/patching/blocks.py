"""A block run in parts: its attention, asked for more than its result, and its MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import Attention
from ..nn.attention import attend_with
from ..ops import reference
from ..ops.masked_channel_attention import WIDEST_HEAD
from .families import PATCH_ANEW, UNNORMED, Family, family_of
from .modules import name_of, unwrapped
from .positions import Packing, Positions, at


class Ask:
    """What a block asks of its attention, and is told. No container of tensors: wrappers pass it on as it is.

    Attributes:
        rows: how many rows are computed, from keys and values of all; None for all.
        key_bias: ``(B, N)``, added to the logits.
        scores: "class" or "received", as in :func:`tokenops.masked_channel_attention`: their mean over the heads.
        key_mean: whether the keys' mean over the heads is wanted.
        learns: whether the scores may need gradients.
        looked_at: told: the scores ``(B, N)``.
        keys: told: the mean keys ``(B, N, D)``, as they are before rotary positions turn them.
    """

    def __init__(
        self,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        scores: str | None = None,
        key_mean: bool = False,
    ) -> None:
        self.rows, self.key_bias, self.scores, self.key_mean = rows, key_bias, scores, key_mean
        self.learns = scores is not None and torch.is_grad_enabled()
        self.looked_at: Tensor | None = None
        self.keys: Tensor | None = None

    def look_at(self, k: Tensor) -> None:
        """Be told the keys ``(B, H, N, D)`` that are about to be turned."""
        if self.key_mean:
            self.keys = k.mean(dim=1)

    @property
    def more(self) -> bool:
        """Whether it is more than a result of fewer rows."""
        return self.key_bias is not None or self.scores is not None or self.key_mean


def attend(
    block: Any, x: Tensor, normed: Tensor | None = None, *, positions: Positions | None = None, **asked: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x plus a block's attention: of its first rows only, if so asked, from keys and values of all.

    Args:
        block: the block, patched or not.
        x: tokens ``(B, N, C)``.
        normed: what the block's first norm makes of x, where that is known.
        positions: those of the patch tokens.
        **asked: those of `Ask`.

    Returns:
        The tokens, the scores ``(B, N)`` and the mean keys ``(B, N, D)``, None where not asked for.
    """
    family = family_of(block)
    normed = _normed(block, family.norm1, x) if normed is None else normed
    asks: list[Ask] = []

    def run(attention: Any, normed: Tensor) -> Tensor:
        asks.append(Ask(**asked))
        return _asked(family, attention, normed, positions, asks[-1])

    y = family.attend(block, normed, run)
    looked_at, keys = _mean([ask.looked_at for ask in asks]), _mean([ask.keys for ask in asks])
    return x[:, : asked.get("rows")] + y, looked_at, keys


def _asked(family: type[Family], attention: Any, x: Tensor, positions: Positions | None, ask: Ask) -> Tensor:
    """The result of one attention of a block."""
    if not family.attention:
        return attended(family, attention, ask, x, positions)
    if ask.rows is None and not ask.more and (family.told or positions is None):
        return family.call(attention, x, positions)
    if hasattr(type(attention), "tokenops_made") or hasattr(type(unwrapped(attention)), "tokenops_made"):
        return family.asked(attention, x, positions, ask)
    if name_of(unwrapped(attention)) not in family.attentions:
        raise ValueError(f"a {name_of(attention)} took the place of a block's attention: {PATCH_ANEW}")
    return attended(family, attention, ask, x, positions)


def _mean(told: list[Tensor | None]) -> Tensor | None:
    """The mean of what parallel attentions tell."""
    found = [tensor for tensor in told if tensor is not None]
    return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0) if found else None


def _normed(block: Any, name: str, x: Tensor) -> Tensor:
    return x if name == UNNORMED else getattr(block, name)(x)


def attended(family: type[Family], attention: Any, ask: Ask, x: Tensor, positions: Positions | None) -> Tensor:
    """The attention's result, of the rows that are asked for."""
    if ask.learns and not torch.is_grad_enabled():
        raise ValueError(
            "the scores that are asked of attention would lose their gradients: checkpoint it with use_reentrant=False"
        )
    if isinstance(positions, Packing):
        return family.attended(attention, ask, x, positions)  # type: ignore[attr-defined]
    dropped, scale = dropped_by(family, attention), family.factor(attention)
    ours = isinstance(attention, Attention)
    masks: Any = {name: getattr(attention, name) if ours else None for name in ("qk_mask", "v_mask")}
    bias = None if ask.key_bias is None else ask.key_bias[:, None, None]
    hiding = None if positions is None else positions.hiding(reference.accumulation_dtype(x.dtype))
    if hiding is not None:
        bias = hiding if bias is None else bias + hiding
    turns = positions is not None and len(positions.tables) > 0
    told = ask.key_mean and not turns  # turned keys would favour neighbours
    of_pairs = None if positions is None or positions.bias is None else positions.bias[:, :, : ask.rows]
    hidden = None if positions is None or ask.scores != "received" else positions.hidden
    seen = None if hidden is None else ~hidden
    written = bool(dropped) or family.mixes or of_pairs is not None or seen is not None  # the matrix
    if written or (not ask.more and family.width(attention) > WIDEST_HEAD):
        q, k, v = family.heads(attention, x, ask, positions)
        if of_pairs is not None:
            bias = of_pairs if bias is None else of_pairs + bias
        if ask.more or family.mixes or any(mask is not None for mask in masks.values()):
            out, ask.looked_at = _dropping(family, attention, q, k, v, dropped, bias, scale, ask.scores, seen, **masks)
            ask.keys = k.mean(dim=1) if told else ask.keys
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), dropout_p=dropped, scale=scale
            )
    else:
        qkv = family.packed(attention, x) if ask.rows is None and getattr(attention, "fused_attn", True) else None
        options = dict(key_bias=bias, scale=scale, scores=ask.scores, heads="mean", return_key_mean=told)
        found: Any = attend_with(attention, qkv, lambda: family.heads(attention, x, ask, positions), **masks, **options)
        out = found[0] if isinstance(found, tuple) else found
        ask.looked_at = found[1] if ask.scores is not None else None
        ask.keys = found[-1] if told else ask.keys
    return family.project(attention, x[:, : ask.rows], out)


def dropped_by(family: type[Family], attention: Any) -> float:
    """The share of its weights that an attention drops, as it is now."""
    dropout: Any = getattr(family.core(attention), family.dropout)  # a module, or a number
    return getattr(dropout, "p", dropout) if attention.training else 0.0


def _dropping(
    family: type[Family],
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    bias: Tensor | None,
    scale: float,
    scores: str | None,
    seen: Tensor | None,
    qk_mask: Tensor | None,
    v_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose weights are dropped, as in training, or mixed, or have a bias of pairs, or is received from some
    of the queries alone, ``seen`` (B, N): the whole matrix is written. Scores are those behind the softmax.
    """
    q = q if qk_mask is None else q * qk_mask.unsqueeze(1).to(q.dtype)
    logits = scale * (q @ k.transpose(-2, -1)).to(reference.accumulation_dtype(q.dtype))
    logits = family.mixed_logits(attention, logits)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    looked_at = None
    if scores is not None and seen is not None:
        share = seen / seen.sum(dim=1, keepdim=True)
        looked_at = (share.to(weights.dtype)[:, None, None] @ weights).squeeze(2).mean(dim=1)
    elif scores is not None:
        looked_at = (weights[:, :, 0] if scores == "class" else weights.mean(dim=2)).mean(dim=1)
    out = F.dropout(family.mixed_weights(attention, weights), p).to(v.dtype) @ v
    return out if v_mask is None else out * v_mask.unsqueeze(1).to(v.dtype), looked_at


def feed(block: Any, x: Tensor, normed: Tensor | None = None) -> Tensor:
    """x plus the MLP of a block; ``normed`` is what its second norm makes of x, where that is known."""
    family = family_of(block)
    normed = _normed(block, family.norm2, x) if normed is None else normed
    return family.feed(block, x, normed)


def whole(
    block: Any, x: Tensor, positions: Positions | None, places: Tensor | None = None, normed: Tensor | None = None
) -> Tensor:
    """What a block gives by itself, of patches at some places."""
    return feed(block, attend(block, x, normed, positions=at(positions, places))[0])
