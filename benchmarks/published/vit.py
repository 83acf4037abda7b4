"""The published forms of token merging and EViT, written plainly on a timm ViT's own modules, both with fast attention.

Token merging after Bolya et al. (ICLR 2023), sections 3 and 3.1; EViT after Liang et al. (ICLR 2022), section 3, whose
published code writes the whole attention matrix: here only the class token's row is written, beside SDPA.
"""

import torch
import torch.nn.functional as F
from torch import nn


def merge_as_published(metric, r, x, size):
    """Tokens with their sizes, r of them merged: ``(x, size)``, size ``(B, N, 1)``."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[:, ::2], metric[:, 1::2]
    scores = a @ b.transpose(-1, -2)
    scores[:, 0] = float("-inf")  # the class token stays
    best, target = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True).unsqueeze(-1)
    source, kept = order[:, :r], order[:, r:].sort(dim=1).values
    target = target.unsqueeze(-1).gather(1, source)

    def merge(t):
        even, odd, C = t[:, ::2], t[:, 1::2], t.shape[-1]
        stay = even.gather(1, kept.expand(-1, -1, C))
        odd = odd.scatter_add(1, target.expand(-1, -1, C), even.gather(1, source.expand(-1, -1, C)))
        return torch.cat((stay, odd), dim=1)

    x, size = merge(x * size), merge(size)
    return x / size, size


def heads_of(attention, x):
    B, N, _ = x.shape
    return attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def projected(attention, out):
    return attention.proj(out.transpose(1, 2).flatten(2))


class Published(nn.Module):
    """A timm ViT with a class token, its blocks run in another way; the model itself is not changed."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        return vit.forward_head(vit.norm(self.run(x)))


class ToMe(Published):
    """Token merging: r tokens a block, keys averaged over the heads as the metric, proportional attention."""

    def __init__(self, vit, r):
        super().__init__(vit)
        self.r = r

    def run(self, x):
        size = None
        for block in self.vit.blocks:
            q, k, v = heads_of(block.attn, block.norm1(x))
            bias = None if size is None else size.log().transpose(1, 2).unsqueeze(1)
            x = x + block.ls1(projected(block.attn, F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
            r = min(self.r, (x.shape[1] - 1) // 2)
            if r > 0:
                size = torch.ones_like(x[..., :1]) if size is None else size
                x, size = merge_as_published(k.mean(dim=1), r, x, size)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


class EViT(Published):
    """EViT: in three blocks, at the quarters of the depth, the tokens that the class token attends to most stay, the
    others are fused."""

    def __init__(self, vit, keep_rate):
        super().__init__(vit)
        self.keep_rate, self.blocks = keep_rate, [i * len(vit.blocks) // 4 for i in (1, 2, 3)]

    def run(self, x):
        for i, block in enumerate(self.vit.blocks):
            q, k, v = heads_of(block.attn, block.norm1(x))
            out = F.scaled_dot_product_attention(q, k, v)
            x = x + block.ls1(projected(block.attn, out))
            if i in self.blocks:
                looked_at = (
                    ((q[:, :, :1] * block.attn.scale) @ k.transpose(-1, -2)).softmax(dim=-1)[:, :, 0, 1:].mean(1)
                )
                x = self.fused(x, looked_at)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x

    def fused(self, x, looked_at):
        (B, N), C = looked_at.shape, x.shape[2]
        count = -int(-self.keep_rate * N // 1)
        index = looked_at.topk(count, dim=1).indices
        places = torch.arange(N, device=x.device).expand(B, -1).scatter(1, index, N)
        others = places.sort(dim=1).values[:, : N - count]
        patches = x[:, 1:]
        best = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, C))
        rest = patches.gather(1, others.unsqueeze(-1).expand(-1, -1, C))
        extra = (rest * looked_at.gather(1, others).unsqueeze(-1)).sum(dim=1, keepdim=True)
        return torch.cat((x[:, :1], best, extra), dim=1)
