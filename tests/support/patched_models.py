"""Small models of every family apply_patch knows, with weights that make attention and tokens differ."""

from functools import partial

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from support.weights import redrawn
from tokenops import apply_patch
from tokenops.patching.engine import tokens_of
from tokenops.patching.site import Site

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
EVA = dict(SIZES, use_rot_pos_emb=True, mlp_ratio=2.0)
#: 16 patches, 3 blocks
FAMILIES = {
    "plain": partial(VisionTransformer, **SIZES),
    "distilled": partial(VisionTransformerDistilled, **SIZES),
    "layer_scale": partial(VisionTransformer, init_values=0.5, no_embed_class=True, **SIZES),
    "registers": partial(VisionTransformer, reg_tokens=4, no_embed_class=True, init_values=0.5, **SIZES),
    "norms": partial(VisionTransformer, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, **SIZES),
    "average": partial(VisionTransformer, class_token=False, global_pool="avg", **SIZES),
    "map": partial(VisionTransformer, class_token=False, global_pool="map", **SIZES),
    "clip": partial(VisionTransformer, pre_norm=True, **SIZES),
    "dynamic": partial(VisionTransformer, dynamic_img_size=True, **SIZES),
    "eva": partial(Eva, **dict(EVA, use_rot_pos_emb=False), init_values=0.5, global_pool="token"),
}
ROTARY = {
    "eva02": partial(Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, **EVA),
    "rope": partial(Eva, init_values=0.5, global_pool="token", qk_norm=True, **EVA),
    "heads": partial(Eva, attn_type="rope", rope_type="mixed", num_reg_tokens=2, **EVA),
    "grouped": partial(
        Eva, attn_type="rope", rope_type="dinov3", rope_rotate_half=True, qkv_fused=False, num_kv_heads=1, **EVA
    ),
}
#: method -> (options that reduce nothing, options that do)
METHODS = {
    "tome": (dict(r=0), dict(r=3)),
    "evit": (dict(keep_rate=1), dict(keep_rate=0.5, reduction_loc=(0, 2))),
    "evo_vit": (dict(prune_ratio=1.0), dict(prune_ratio=0.5)),
    "patch_slimming": (dict(schedule=[17, 17, 17]), dict(schedule=[13, 9, 4])),
    "sit": (dict(keeping_ratio=1), dict(keeping_ratio=0.5, locations=(1, 2))),
    "cait": (dict(points={}), dict(points={0: "horizontal", 1: "vertical"})),
}
#: tokens behind each block, of 16 patches and no prefix, where the second options reduce
BEHIND = {
    "tome": [13, 10, 7],
    "evit": [9, 9, 6],
    "evo_vit": [16, 16, 16],  # hooks see the end of a stage
    "patch_slimming": [12, 8, 3],
    "sit": [16, 8, 4],
    "cait": [8, 4, 4],
}


def model_of(family, **kwargs):
    torch.manual_seed(0)
    return redrawn({**FAMILIES, **ROTARY}[family](**kwargs))


def applied(model, method):
    torch.manual_seed(3)  # token slimmings are drawn
    return apply_patch(model, method, **METHODS[method][1])


def patched(method, family="plain", **kwargs):
    return applied(model_of(family, **kwargs), method)


def images(size=2, side=32, seed=2):
    made = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed), device="cpu")
    return made.to(torch.get_default_device())


def tokens_behind(model, x, **kwargs):
    """How many tokens come out of every block."""
    counts = []
    hooks = [
        block.register_forward_hook(lambda m, a, y: counts.append(tokens_of(y).shape[1])) for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(x, **kwargs)
    for hook in hooks:
        hook.remove()
    return counts


def gradients(model, x, run=lambda model, x: model(x)):
    """The gradients by name, and how many bytes were kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(model, x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()}
    return found, sum(size for place, size in kept.items() if place not in weights)


def blocks_of(model):
    return Site(model).blocks


def plain(block):
    """The block as it is without its method."""
    return lambda *args, **kwargs: type(block).tokenops_made[0].forward(block, *args, **kwargs)


def softmax_attention(attention, x, log_sizes=None):
    """The attention's result and the keys' mean over the heads, with the whole matrix written out."""
    B, N, _ = x.shape
    q, k, v = attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if log_sizes is not None:
        logits = logits + log_sizes[:, None, None]
    weights = logits.softmax(dim=-1)
    y = attention.norm((weights @ v).transpose(1, 2).reshape(B, N, -1))
    return attention.proj(y), weights, k.mean(dim=1)


def embedded(model, x):
    return model.norm_pre(model._pos_embed(model.patch_embed(x)))


def merged_image(x, keys, sizes, r, prefix):
    """ToMe of one image (N, C): pairs by a loop over tokens; also which tokens went into which."""
    rows = range(prefix, len(x))
    A, B = [i for i in rows if i % 2 == 0], [i for i in rows if i % 2]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    likeness = {i: max((float(unit[i] @ unit[j]), -j) for j in B) for i in A}
    gone = sorted(A, key=lambda i: (-likeness[i][0], i))[:r]
    groups = [[i] for i in range(prefix)] + [[i] for i in A if i not in gone]
    groups += [[j, *(i for i in gone if -likeness[i][1] == j)] for j in B]
    tokens = torch.stack([sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group) for group in groups])
    return tokens, torch.stack([sum(sizes[i] for i in group) for group in groups]), groups
