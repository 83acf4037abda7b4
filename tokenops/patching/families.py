"""What the engine knows of blocks: where each kind keeps its parts, and how its attention is computed."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from .. import reference
from ..masked_channel_attention import WIDEST_HEAD, masked_channel_attention
from ..nn import Attention

_EVERYWHERE: tuple[dict[int, Any], ...] = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)

#: what to do where a patched model was changed since
PATCH_ANEW = "remove_patch, and apply_patch to the model as it is now"


class Ask:
    """What a block asks of its attention, and is told. No container of tensors: wrappers pass it on as it is.

    Attributes:
        rows: how many rows are computed, from keys and values of all; None for all.
        key_bias: ``(B, N)``, added to the logits.
        scores: "class" or "received", as in :func:`tokenops.masked_channel_attention`: their mean over the heads.
        key_mean: whether the keys' mean over the heads is wanted.
        learns: whether the scores may need gradients.
        looked_at: told: the scores ``(B, N)``.
        keys: told: the mean keys ``(B, N, D)``.
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

    @property
    def more(self) -> bool:
        """Whether it is more than a result of fewer rows."""
        return self.key_bias is not None or self.scores is not None or self.key_mean


def keeps_forward(module: Any, name: str = "forward") -> bool:
    """Whether a module has no forward but that of its class, which accelerate's hooks leave on it."""
    own = vars(module).get(name)
    return own is None or getattr(own, "__func__", None) is type(module).forward


def exact(module: nn.Module, *kinds: type) -> bool:
    """Whether a module computes what its class does from its parameters, unseen: no hook, no forward of its own, not
    compiled by itself, plain parameters. Only then may an operator compute it instead.
    """
    if type(module) not in kinds or not keeps_forward(module) or module._compiled_call_impl is not None or watched():
        return False
    seen = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not seen and all(p is None or type(p) is nn.Parameter for p in module._parameters.values())


def watched() -> bool:
    """Whether there are hooks of every module, but for those of torch's FLOP counter, which look at names alone."""
    if not any(_EVERYWHERE):
        return False
    hooks = [hook for everywhere in _EVERYWHERE for hook in everywhere.values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def fusable(norm: nn.Module) -> tuple[Any, Any, float] | None:
    """A norm as operators take it, to apply it in their launch; None where it must be called."""
    return (norm.weight, norm.bias, norm.eps) if exact(norm, nn.LayerNorm, LayerNorm) else None  # type: ignore


class Family:
    """A kind of pre-norm block, timm's own. Classes stand for kinds, without instances, so blocks copy and pickle."""

    norm1: str = "norm1"
    attention: str = "attn"
    norm2: str = "norm2"
    #: what a model may pass to a block behind the tokens, by position
    arguments: tuple[str, ...] = ("attn_mask", "is_causal")
    #: dropout of attention weights and the factor of the logits, attributes of the attention
    dropout: str = "attn_drop"
    scale: str = "scale"
    attentions: tuple[str, ...] = (
        "timm.layers.attention.Attention",
        "timm.models.vision_transformer.Attention",
        "tokenops.nn.attention.Attention",
    )
    parts: tuple[str, ...] = ("ls1", "drop_path1", "mlp", "ls2", "drop_path2")
    projections: tuple[str, ...] = ("qkv", "proj")

    @classmethod
    def check(cls, block: Any) -> None:
        """TypeError in words where a block is not laid out as this kind's are."""
        attention = unwrapped(getattr(block, cls.attention, None))
        if name_of(attention) not in cls.attentions:
            raise TypeError(f"its attention is {name_of(attention)}, but it must be {' or '.join(cls.attentions)}")
        of_attention = [name for name in (*cls.projections, cls.dropout, cls.scale) if not hasattr(attention, name)]
        missing = [name for name in (cls.norm1, cls.norm2, *cls.parts) if not hasattr(block, name)] + of_attention
        if missing:
            raise TypeError(f"it has no {', '.join(missing)}: it is that of another version")
        for module in (block, attention):
            if not keeps_forward(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward"):
                raise TypeError("its forward was replaced, by one that a patch would undo")

    @staticmethod
    def unmasked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block's arguments behind the tokens, without what stands for no mask."""
        return args

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        """The block's own attention."""
        return attention(x, **ask)

    @classmethod
    def asked(cls, attention: Any, ask: Ask, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Any:
        """The attention's result as its own forward returns it, computed so that what is asked for is told."""
        return attended(cls, attention, ask, x, rope)

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q ``(B, H, rows, D)`` of the first rows (all for None), k and v ``(B, H, N, D)`` of all."""
        H, wide = attention.num_heads, attention.num_heads * attention.head_dim
        deep = H * getattr(attention, "v_head_dim", attention.head_dim)
        if rows is None or not exact(attention.qkv, nn.Linear):
            q, k, v = attention.qkv(x).split((wide, wide, deep), dim=-1)
        else:
            weight, bias = attention.qkv.weight, attention.qkv.bias
            q = F.linear(x[:, :rows], weight[:wide], None if bias is None else bias[:wide])
            k, v = F.linear(x, weight[wide:], None if bias is None else bias[wide:]).split((wide, deep), dim=-1)
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q[:, :rows], k, v))
        return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        """The heads' result ``(B, n, C)`` to the attention's; x are the tokens it was made from."""
        out = attention.norm(out) if getattr(attention, "norm", None) is not None else out
        if getattr(attention, "gate", None) is not None:
            out = out * attention.gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(block.ls1(y))

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(y))


class Eva(Family):
    """timm's EvaBlock: rotary positions, projections together or apart, LayerScale as parameters."""

    arguments = ("rope", "attn_mask", "is_causal")
    attentions = (
        "timm.models.eva.EvaAttention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.AttentionRope",
    )
    parts = ("gamma_1", "drop_path1", "mlp", "gamma_2", "drop_path2")
    projections = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "num_prefix_tokens")

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        return attention(x, rope=rope, **ask)

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if attention.qkv is None:
            q, k, v = attention.q_proj(x[:, :rows]), attention.k_proj(x), attention.v_proj(x)
        elif getattr(attention, "q_bias", None) is None:
            q, k, v = attention.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            apart = attention.qkv_bias_separate
            qkv = attention.qkv(x) + bias if apart else F.linear(x, attention.qkv.weight, bias)
            q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q[:, :rows], k, v))
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rope is not None:
            q, k = (_rotated(attention, t, rope) for t in (q, k))
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q.to(v.dtype), k.to(v.dtype), v

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


class Clip(Family):
    """transformers' CLIPEncoderLayer and SiglipEncoderLayer."""

    norm1, attention, norm2 = "layer_norm1", "self_attn", "layer_norm2"
    arguments = ("attention_mask", "output_attentions")
    dropout = "dropout"
    attentions: tuple[str, ...] = (
        "transformers.models.clip.modeling_clip.CLIPAttention",
        "transformers.models.siglip.modeling_siglip.SiglipAttention",
    )
    parts: tuple[str, ...] = ("mlp",)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj", "head_dim")

    @staticmethod
    def call(attention: Any, x: Tensor, rope: Tensor | None, **ask: Any) -> Tensor:
        return attention(x, attention_mask=None, **ask)[0]

    @classmethod
    def asked(cls, attention: Any, ask: Ask, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Any:
        return attended(cls, attention, ask, x, rope), None

    @staticmethod
    def heads(attention: Any, x: Tensor, rows: int | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.q_proj(x[:, :rows]), attention.k_proj(x), attention.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.out_proj(out)

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return y


class HfViT(Clip):
    """transformers' ViTLayer."""

    norm1, attention, norm2 = "layernorm_before", "attention", "layernorm_after"
    dropout, scale = "attention_dropout", "scaling"
    attentions = ("transformers.models.vit.modeling_vit.ViTAttention",)
    parts = ("mlp", "dropout")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")

    @staticmethod
    def unmasked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (None, *args[1:]) if args and args[0] is not None and args[0].shape[-1] == 0 else args

    @staticmethod
    def project(attention: Any, x: Tensor, out: Tensor) -> Tensor:
        return attention.o_proj(out)

    @staticmethod
    def after_attention(block: Any, y: Tensor) -> Tensor:
        return block.dropout(y)

    @staticmethod
    def after_mlp(block: Any, y: Tensor) -> Tensor:
        return block.dropout(y)


#: where modules that wrap another keep it: activation checkpointing, FSDP1, torch.compile
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def unwrapped(module: Any) -> Any:
    """A module without what wraps it."""
    while found := [name for name in _WRAPPED if name in getattr(module, "_modules", ())]:
        module = module._modules[found[0]]
    return module


#: the blocks that can be patched: exactly these, as a class derived from one may compute something else
FAMILIES: dict[str, type[Family]] = {
    "timm.models.vision_transformer.Block": Family,
    "timm.models.eva.EvaBlock": Eva,
    "transformers.models.vit.modeling_vit.ViTLayer": HfViT,
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": Clip,
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": Clip,
}


def name_of(thing: Any) -> str:
    """The full name of an object's class: behind fully_shard that of what was sharded."""
    kinds = [kind for kind in type(thing).__mro__ if issubclass(kind, nn.Module) and not is_sharded(kind)]
    kind = kinds[0] if kinds else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_sharded(kind: type) -> bool:
    """Whether a class is of modules that fully_shard has taken the parameters of."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def family_of(block: Any) -> type[Family]:
    """The kind of a block, patched or not."""
    return getattr(type(block), "tokenops_family", None) or FAMILIES[name_of(block)]


def attend(
    block: Any, x: Tensor, normed: Tensor | None = None, *, rope: Tensor | None = None, **asked: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x plus a block's attention: of its first rows only, if so asked, from keys and values of all.

    Args:
        block: the block, patched or not.
        x: tokens ``(B, N, C)``.
        normed: what the block's first norm makes of x, where that is known.
        rope: rotary positions of the patch tokens.
        **asked: those of `Ask`.

    Returns:
        The tokens, the scores ``(B, N)`` and the mean keys ``(B, N, D)``, None where not asked for.
    """
    family = family_of(block)
    attention = getattr(block, family.attention)
    normed = getattr(block, family.norm1)(x) if normed is None else normed
    ask = Ask(**asked)
    if ask.rows is None and not ask.more:
        y = family.call(attention, normed, rope)
    elif hasattr(type(attention), "tokenops_made") or hasattr(type(unwrapped(attention)), "tokenops_made"):
        y = family.call(attention, normed, rope, ask=ask)
    else:
        if name_of(unwrapped(attention)) not in family.attentions:
            raise ValueError(f"a {name_of(attention)} took the place of a block's attention: {PATCH_ANEW}")
        y = attended(family, attention, ask, normed, rope)
    return x[:, : ask.rows] + family.after_attention(block, y), ask.looked_at, ask.keys


def attended(family: type[Family], attention: Any, ask: Ask, x: Tensor, rope: Tensor | None) -> Tensor:
    """The attention's result, of the rows that are asked for."""
    if ask.learns and not torch.is_grad_enabled():
        raise ValueError(
            "the scores that are asked of attention would lose their gradients: checkpoint it with use_reentrant=False"
        )
    dropout: Any = getattr(attention, family.dropout)  # a module, or a number
    dropped: float = getattr(dropout, "p", dropout) if attention.training else 0.0
    q, k, v = family.heads(attention, x, ask.rows, rope)
    scale = getattr(attention, family.scale)
    if not ask.more and (dropped or max(q.shape[3], v.shape[3]) > WIDEST_HEAD):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, scale=scale)
    else:
        ours = isinstance(attention, Attention)
        masks: Any = {name: getattr(attention, name) if ours else None for name in ("qk_mask", "v_mask")}
        bias = None if ask.key_bias is None else ask.key_bias[:, None, None]
        if dropped:
            out, ask.looked_at, ask.keys = _dropping(q, k, v, dropped, bias, scale, ask.scores, **masks)
        else:
            operator: Any = (
                masked_channel_attention
                if getattr(attention, "fused_attn", True)
                else reference.masked_channel_attention
            )
            found: Any = operator(
                q,
                k,
                v,
                **masks,
                key_bias=bias,
                scale=scale,
                scores=ask.scores,
                heads="mean",
                return_key_mean=ask.key_mean,
            )
            out = found[0] if isinstance(found, tuple) else found
            ask.looked_at = found[1] if ask.scores is not None else None
            ask.keys = found[-1] if ask.key_mean else None
    return family.project(attention, x[:, : ask.rows], out.transpose(1, 2).flatten(2))


def _dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    bias: Tensor | None,
    scale: float,
    scores: str | None,
    qk_mask: Tensor | None,
    v_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention whose weights are dropped, as in training: the whole matrix is written. Scores are of before that."""
    q = q if qk_mask is None else q * qk_mask.unsqueeze(1).to(q.dtype)
    logits = scale * (q @ k.transpose(-2, -1)).to(reference.accumulation_dtype(q.dtype))
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    looked_at = None
    if scores is not None:
        looked_at = (weights[:, :, 0] if scores == "class" else weights.mean(dim=2)).mean(dim=1)
    out = F.dropout(weights, p).to(v.dtype) @ v
    return out if v_mask is None else out * v_mask.unsqueeze(1).to(v.dtype), looked_at, k.mean(dim=1)


def feed(block: Any, x: Tensor, normed: Tensor | None = None) -> Tensor:
    """x plus the MLP of a block; ``normed`` is what its second norm makes of x, where that is known."""
    family = family_of(block)
    normed = getattr(block, family.norm2)(x) if normed is None else normed
    return x + family.after_mlp(block, block.mlp(normed))


def whole(
    block: Any, x: Tensor, rope: Tensor | None, places: Tensor | None = None, normed: Tensor | None = None
) -> Tensor:
    """What a block gives by itself, of patches at some places."""
    return feed(block, attend(block, x, normed, rope=rope_rows(rope, places))[0])


def positions(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The rotary positions among a block's arguments behind the tokens.

    Raises:
        ValueError: there is a mask among them, or attention weights are asked for.
    """
    if not args and not kwargs:  # timm's loop
        return None
    family = family_of(block)
    given = {**dict(zip(family.arguments, args)), **kwargs}
    config = getattr(getattr(block, family.attention), "config", None)
    if getattr(config, "output_attentions", False):
        raise ValueError("config.output_attentions is on, but a patched model has no attention weights of all tokens")
    for name in ("attn_mask", "attention_mask", "is_causal", "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{name} was given to a patched model, whose tokens change between blocks: leave it out")
    return given.get("rope")


def head_width(block: Any) -> int:
    """Channels of the widest head."""
    attention = unwrapped(getattr(block, family_of(block).attention))
    return max(attention.head_dim, getattr(attention, "v_head_dim", 0))


def rope_rows(rope: Tensor | None, places: Tensor | None) -> Tensor | None:
    """The rotary positions of some patches, in their order: ``(N,)`` for all images, or ``(B, N)``.

    Positions are ``(N, D)``, ``(H, N, D)`` where heads have their own, or either with the images before them
    ``(B, H or 1, N, D)``.
    """
    if rope is None or places is None:
        return rope
    if places.dim() == 1:
        return rope.index_select(-2, places)
    B = places.shape[0]
    full = rope.expand(B, *rope.shape[-3:]) if rope.dim() > 2 else rope.expand(B, 1, *rope.shape)
    index = places[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
    return full.gather(2, index)


def _rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    patches = apply_rot_embed_cat(x[:, :, prefix:], rope[..., : x.shape[2] - prefix, :], **half)
    return torch.cat((x[:, :, :prefix], patches), dim=2)
