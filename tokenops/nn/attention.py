"""Attention for vision transformers: timm's module on masked_channel_attention, and what makes it smaller."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import reference
from ..ops.masked_channel_attention import WIDEST_HEAD, masked_channel_attention, masked_channel_attention_qkv
from ..ops.reference import accumulation_dtype
from .watched import exact

#: the modules whose Attention is the one this module stands in for
_TIMM = ("timm.layers.attention", "timm.models.vision_transformer")
_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class Attention(nn.Module):
    r"""Multi-head self-attention, a drop-in for timm's, that can also say how much attention each token got.

    :func:`tokenops.masked_channel_attention` reads q, k and v straight from the packed projection. Parameter names,
    constructor and results are those of ``timm.layers.Attention``; heads of k and v may differ in width.

    What the operator cannot do runs through ``scaled_dot_product_attention``: masks that differ between queries, causal
    attention, dropout of attention weights while training, and heads wider than 128. Scores, key bias, key lengths and
    channel masks are refused there.

    Args:
        dim: channels of a token.
        num_heads: H.
        attn_head_dim: channels of a head of q and k, ``dim // num_heads`` unless given.
        dim_out: channels that come out, ``dim`` unless given.
        qkv_bias: whether the packed projection has a bias.
        qk_norm: whether q and k are normalised by ``norm_layer``, a head at a time.
        scale_norm: whether the heads' result is normalised by ``norm_layer``.
        proj_bias: whether the output projection has a bias.
        gated: whether the heads' result is multiplied by a sigmoid gate made from the tokens.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the result.
        norm_layer: constructor of the norms.
        v_head_dim: channels of a head of v, as many as of q unless given.
        scale: of the logits, ``head_dim ** -0.5`` unless given.

    Attributes:
        qk_mask: ``(H, Dk)``, None at first: soft mask of the channels of q and k. A tensor set here is a buffer, an
            ``nn.Parameter`` learns; either is in the state dict from then on, so set one before loading it.
        v_mask: ``(H, Dv)``, the same for the channels of v.
        fused_attn: False computes in plain PyTorch, by the operator's reference.

    Shapes:
        ``x`` is ``(B, N, dim)``, the result ``(B, N, dim_out)``; scores are as the operator returns them.

    Raises:
        ValueError: sizes do not fit together.

    >>> attention = Attention(64, num_heads=4)
    >>> y, scores = attention(torch.randn(2, 17, 64), scores="class", heads="mean")
    >>> y.shape, scores.shape
    (torch.Size([2, 17, 64]), torch.Size([2, 17]))
    """

    fused_attn: bool
    scale: float
    qk_mask: Tensor | None
    v_mask: Tensor | None
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = None,
        *,
        v_head_dim: int | None = None,
        scale: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer")
        head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        if min(head_dim, v_head_dim) < 1:
            raise ValueError(f"head_dim={head_dim} and v_head_dim={v_head_dim} must be at least 1")
        made = {"device": device, "dtype": dtype}
        self._set_sizes(num_heads, head_dim, v_head_dim, head_dim**-0.5 if scale is None else scale)
        self.fused_attn = True
        self.qkv = nn.Linear(dim, num_heads * (2 * self.head_dim + self.v_head_dim), bias=qkv_bias, **made)
        self.q_norm = norm_layer(head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, **made) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **made) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **made) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def _set_sizes(self, num_heads, head_dim, v_head_dim, scale):
        self.num_heads, self.head_dim, self.v_head_dim, self.scale = num_heads, head_dim, v_head_dim, scale
        self.attn_dim = num_heads * v_head_dim
        self.register_buffer("qk_mask", None)
        self.register_buffer("v_mask", None)

    @classmethod
    def from_timm(cls, attention: Any) -> "Attention":
        """The same attention as a timm module (or one of this class), whose submodules (parameters, masks) it shares.

        Raises:
            TypeError: it is not timm's ``Attention``: with rotary or relative positions, say, or of another model.
        """
        kind = type(attention)
        if isinstance(attention, Attention):
            new = cls._sharing(attention)
            new.qk_mask, new.v_mask = attention.qk_mask, attention.v_mask
            return new
        if kind.__name__ != "Attention" or kind.__module__ not in _TIMM:
            raise TypeError(
                f"Attention.from_timm takes timm.layers.Attention, but got {kind.__module__}.{kind.__name__}"
            )
        return cls._sharing(attention)

    @classmethod
    def _sharing(cls, attention):
        """Another attention's submodules, without its masks."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        v_head_dim = getattr(attention, "v_head_dim", attention.head_dim)
        new._set_sizes(attention.num_heads, attention.head_dim, v_head_dim, attention.scale)
        new.fused_attn, new.training = attention.fused_attn, attention.training
        for name in _PARTS:
            setattr(new, name, getattr(attention, name, nn.Identity() if name == "norm" else None))
        return new

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        scores: str | None = None,
        heads: str = "each",
        return_key_mean: bool = False,
    ) -> Any:
        """Attention of the tokens to each other.

        Args:
            x: tokens.
            attn_mask: added to the logits where it is a float tensor, False where a key does not count where it is
                bool; ``(B or 1, H or 1, 1, N)`` is a key bias, other shapes that broadcast to ``(B, H, N, N)`` as in
                ``scaled_dot_product_attention``.
            is_causal: token i sees tokens up to i.
            key_bias, key_lengths, scores, heads, return_key_mean: as in :func:`tokenops.masked_channel_attention`.

        Returns:
            The result alone, or ``(result, scores)``, ``(result, key_mean)``, ``(result, scores, key_mean)``.
        """
        of_keys = attn_mask is None or (attn_mask.dim() == 4 and attn_mask.shape[2:] == (1, x.shape[1]))
        per_query = is_causal or not of_keys
        dropped = self.attn_drop.p if self.training else 0.0
        if per_query or dropped or max(self.head_dim, self.v_head_dim) > WIDEST_HEAD:
            asked = dict(scores=scores, key_bias=key_bias, key_lengths=key_lengths, return_key_mean=return_key_mean)
            for name, value in dict(asked, qk_mask=self.qk_mask, v_mask=self.v_mask).items():
                if value is not None and value is not False:
                    why = "a mask of queries" if per_query else "dropout" if dropped else f"heads over {WIDEST_HEAD}"
                    raise ValueError(f"Attention: {name} cannot be had with {why}, which only SDPA does")
            q, k, v = heads_of(self, x)
            torchs: Any = dict(attn_mask=attn_mask, dropout_p=dropped, is_causal=is_causal, scale=self.scale)
            return project(self, x, F.scaled_dot_product_attention(q, k, v, **torchs))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, float("-inf"))
            key_bias = attn_mask if key_bias is None else key_bias + attn_mask
        options: Any = dict(
            qk_mask=self.qk_mask,
            v_mask=self.v_mask,
            key_bias=key_bias,
            key_lengths=key_lengths,
            scale=self.scale,
            scores=scores,
            heads=heads,
            return_key_mean=return_key_mean,
        )
        out = attend_with(self, packed(self, x) if self.fused_attn else None, lambda: heads_of(self, x), **options)
        return (project(self, x, out[0]), *out[1:]) if isinstance(out, tuple) else project(self, x, out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, v_head_dim={self.v_head_dim}"


def packed(attention: Any, x: Tensor) -> Tensor | None:
    """q, k and v of all tokens side by side, as one projection makes them; None where something comes between."""
    plain = exact(attention.q_norm, nn.Identity) and exact(attention.k_norm, nn.Identity)
    return attention.qkv(x) if plain else None


def heads_of(attention: Any, x: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q ``(B, H, rows, D)`` of the first rows (all for None), k and v ``(B, H, N, D)`` of all, of timm's module or this
    one: views of the packed projection where nothing normalises them.
    """
    H, wide = attention.num_heads, attention.num_heads * attention.head_dim
    deep = H * getattr(attention, "v_head_dim", attention.head_dim)
    if rows is None or not exact(attention.qkv, nn.Linear):
        q, k, v = attention.qkv(x).split((wide, wide, deep), dim=-1)
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q = F.linear(x[:, :rows], weight[:wide], None if bias is None else bias[:wide])
        k, v = F.linear(x, weight[wide:], None if bias is None else bias[wide:]).split((wide, deep), dim=-1)
    q, k, v = split_heads(q[:, :rows], H), split_heads(k, H), split_heads(v, H)
    return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v


def split_heads(x: Tensor, heads: int = -1, width: int = -1) -> Tensor:
    """``(B, N, H*D)`` to ``(B, H, N, D)``, by how many heads there are or how wide they are."""
    return x.unflatten(-1, (heads, width)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` to ``(B, N, H*D)``."""
    return x.transpose(1, 2).flatten(2)


def attend_with(attention: Any, qkv: Tensor | None, apart: Callable[[], tuple[Tensor, ...]], **options: Any) -> Any:
    """The operator on a packed projection or, without one, q, k and v; the reference where attention is not fused."""
    if qkv is not None:
        return masked_channel_attention_qkv(qkv, attention.num_heads, head_dim=attention.head_dim, **options)
    fused = getattr(attention, "fused_attn", True)
    operator: Any = masked_channel_attention if fused else reference.masked_channel_attention
    return operator(*apart(), **options)


def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
    """The heads' result ``(B, H, n, D)`` to the attention's; x are the tokens it was made from."""
    out = merge_heads(out)
    out = attention.norm(out) if getattr(attention, "norm", None) is not None else out
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def convert_attention(model: nn.Module) -> int:
    """Replace every timm ``Attention`` within a model by :class:`Attention`, in place; parameters and names stay.

    Of a patched model they are patched still.

    Returns:
        How many were replaced.

    Raises:
        ValueError: there is none.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == "Attention" and type(child).__module__ in _TIMM
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no timm.layers.Attention within")
    for parent, name, child in found:
        dress: Any = getattr(child, "tokenops_dress", lambda ours: ours)
        setattr(parent, name, dress(Attention.from_timm(child)))
    return len(found)


def compact_channels(attention: Attention, keep_qk: Tensor | None = None, keep_v: Tensor | None = None) -> Attention:
    r"""A physically smaller attention: the channels that are not kept are taken out of its projections.

    The result equals the attention with the hard masks ``keep_qk`` and ``keep_v`` (times the soft masks it has, which
    are folded into the weights; ``qk_mask`` stays where q is normalised). Every head keeps as many channels as the
    others, each its own. The scale of the logits stays that of the original head.

    Args:
        attention: what to make smaller; it is not changed.
        keep_qk: channels of q and k that stay: ``(H, Dk)`` bool, or ``(H, d)`` indices. None keeps all.
        keep_v: channels of v that stay, ``(H, Dv)`` bool or ``(H, d)`` indices. None keeps all.

    Returns:
        A new module with parameters of its own.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a head would keep another number of channels than the others, or none; an index is out of range or
            twice there; or a norm (``qk_norm``, ``scale_norm``) runs over the channels to be taken out.

    Source: physical compaction after CAIT (Wang et al., arXiv 2309.15755), a reconstruction.
    """
    if not isinstance(attention, Attention):
        raise TypeError(f"compact_channels takes tokenops.nn.Attention, but got {type(attention).__name__}")
    H, wide, deep = attention.num_heads, attention.head_dim, attention.v_head_dim
    q_normed, k_normed, normed = (
        not isinstance(norm, nn.Identity) for norm in (attention.q_norm, attention.k_norm, attention.norm)
    )
    for name, keep, norm in (("keep_qk", keep_qk, q_normed or k_normed), ("keep_v", keep_v, normed)):
        if keep is not None and norm:
            raise ValueError(f"compact_channels: {name} would take channels out of a norm over all of them")
    device = attention.qkv.weight.device
    qk = _kept("keep_qk", keep_qk, H, wide).to(device)
    v = _kept("keep_v", keep_v, H, deep).to(device)
    qk_rows, v_rows = (_of_all_heads(kept, width) for kept, width in ((qk, wide), (v, deep)))

    small = copy.deepcopy(Attention._sharing(attention))  # without the masks, which may be results of other tensors
    small._set_sizes(H, qk.shape[1], v.shape[1], attention.scale)
    factors = torch.ones(H * (2 * wide + deep), device=device, dtype=accumulation_dtype(attention.qkv.weight.dtype))
    if attention.qk_mask is not None and q_normed:  # it comes behind the norm
        small.qk_mask = attention.qk_mask.detach().clone()
    elif attention.qk_mask is not None:
        factors[: H * wide] = attention.qk_mask.detach().flatten()
    if attention.v_mask is not None:
        factors[2 * H * wide :] = attention.v_mask.detach().flatten()
    rows = torch.cat((qk_rows, H * wide + qk_rows, 2 * H * wide + v_rows))
    small.qkv = part_of(attention.qkv, rows, factors[rows])
    if attention.gate is not None:
        small.gate = part_of(attention.gate, v_rows)
    small.proj = part_of(attention.proj, v_rows, inputs=True)
    return small


def _kept(name, keep, H, channels):
    """Indices (H, d) of the channels that stay, in their order."""
    if keep is None:
        return torch.arange(channels).expand(H, -1)
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.bool, torch.int64, torch.int32):
        what = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"compact_channels: {name} must be a tensor of bool or int64, but got {what}")
    if keep.dim() != 2 or keep.shape[0] != H or (keep.dtype == torch.bool and keep.shape[1] != channels):
        raise ValueError(
            f"compact_channels: {name} must be bool ({H}, {channels}) or indices ({H}, d), but got {tuple(keep.shape)}"
        )
    if keep.dtype != torch.bool:
        keep = keep.long()
        if keep.numel() and (keep.min() < 0 or keep.max() >= channels):
            raise ValueError(f"compact_channels: {name} has an index outside of 0..{channels - 1}")
        if any(len(head.unique()) != len(head) for head in keep):
            raise ValueError(f"compact_channels: {name} has an index twice in one head")
        keep = torch.zeros(H, channels, dtype=torch.bool, device=keep.device).scatter_(1, keep, True)
    counts = keep.sum(dim=1)
    if len(counts.unique()) != 1 or counts[0] == 0:
        raise ValueError(
            f"compact_channels: {name} must keep as many channels in every head, but keeps {counts.tolist()}"
        )
    return keep.nonzero()[:, 1].reshape(H, -1)


def _of_all_heads(kept, width):
    """Indices (H, d) within the heads to indices within all heads' channels."""
    return (torch.arange(kept.shape[0], device=kept.device).unsqueeze(1) * width + kept).flatten()


def part_of(linear: Any, kept: Tensor, factors: Tensor | None = None, *, inputs: bool = False) -> nn.Linear:
    """A linear layer with some outputs of another (or some inputs), the weights of each times its factor."""
    ins, outs = (len(kept), linear.out_features) if inputs else (linear.in_features, len(kept))
    kept = kept.to(linear.weight.device)
    new = nn.Linear(ins, outs, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
    for name, parameter in linear.named_parameters():
        value = parameter.detach()
        if inputs and name == "bias":
            value = value.clone()
        else:
            value = value[:, kept] if inputs else value[kept]
            if factors is not None:
                value = (value * (factors if inputs or value.dim() == 1 else factors.unsqueeze(1))).to(value.dtype)
        setattr(new, name, nn.Parameter(value, parameter.requires_grad))
    return new.train(linear.training)
