"""The computation the Evo-ViT authors published for DeiT, in plain PyTorch, written anew as the oracle of the tests.

It keeps what tokenops does otherwise: the whole attention matrix in every block, scores summed over the heads, all
patch tokens sorted by score before a stage and never unsorted, a cat behind it, the mean over all tokens at the end.
Module names are those of the published checkpoints (github.com/YifanXu74/Evo-ViT).
"""

import torch
from torch import nn


class Named(nn.Module):
    """Children under given names."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def rows(x, order):
    """Row order[b, j] of image b in place j."""
    return torch.stack([image[places] for image, places in zip(x, order, strict=True)])


class PublishedEvoViT(nn.Module):
    """`chosen` lists, after a forward pass, the places (B, k) of each pruned stage's tokens (layer-wise: block's)."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        depth=12,
        img_size=224,
        num_classes=1000,
        prune_ratio=(1.0,) * 4 + (0.5,) * 8,
        tradeoff=(1.0,) * 4 + (0.5,) * 8,
        stages=(4, 8),
        stage_wise=True,
    ):
        super().__init__()
        self.heads, self.stage_wise = num_heads, stage_wise
        self.prune_ratio, self.tradeoff, self.stages = prune_ratio, tradeoff, stages
        self.patch_embed = Named(proj=nn.Conv2d(3, embed_dim, 16, 16))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // 16) ** 2 + 1, embed_dim))

        def norm():
            return nn.LayerNorm(embed_dim, eps=1e-6)

        def linear(outputs, inputs=embed_dim):
            return nn.Linear(inputs, outputs)

        self.blocks = nn.ModuleList(
            Named(norm2=norm(), mlp=Named(fc1=linear(4 * embed_dim), fc2=linear(embed_dim, 4 * embed_dim)))
            for _ in range(depth)
        )
        self.qks = nn.ModuleList(Named(qk=linear(2 * embed_dim)) for _ in range(depth))
        self.vs = nn.ModuleList(Named(v=linear(embed_dim)) for _ in range(depth))
        self.norms = nn.ModuleList(norm() for _ in range(depth))
        self.projs = nn.ModuleList(linear(embed_dim) for _ in range(depth))
        self.norm, self.head = norm(), linear(num_classes)
        self.head_cls, self.norm_cls = linear(num_classes), norm()

    def block(self, i, x):
        """The block's tokens, and the attention of the class token to each patch token, summed over the heads."""
        y = self.norms[i](x)

        def of_heads(t):
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k = (of_heads(t) for t in self.qks[i].qk(y).chunk(2, dim=2))
        v = of_heads(self.vs[i].v(y))
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)
        x = x + self.projs[i]((weights @ v).transpose(1, 2).flatten(2))
        mlp = self.blocks[i].mlp
        x = x + mlp.fc2(nn.functional.gelu(mlp.fc1(self.blocks[i].norm2(x))))
        return x, weights[:, :, 0, 1:].sum(dim=1)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        depth, N = len(self.blocks), x.shape[1] - 1
        places = torch.arange(N).expand(x.shape[0], -1)
        self.chosen = []
        g = left = None
        for i in range(depth):
            pruned = i >= self.stages[0] if self.stages else False
            begins = i in self.stages if self.stage_wise else pruned
            if begins:
                n = int(self.prune_ratio[i] * N)
                order = torch.sort(g, dim=1, descending=True).indices
                patches = rows(x[:, 1:], order)
                g, places = rows(g, order), rows(places, order)
                self.chosen.append(places[:, :n])
                left = patches[:, n:]
                x = torch.cat((x[:, :1], patches[:, :n]), dim=1)
            x, a = self.block(i, x)
            if i == 0:
                g = a
            else:
                n, alpha = a.shape[1], self.tradeoff[i]
                g = torch.cat(((1 - alpha) * g[:, :n] + alpha * a, g[:, n:]), dim=1)
            ends = i + 1 in (*self.stages, depth) if self.stage_wise else True
            if pruned and ends:
                x = torch.cat((x, left), dim=1)
        logits = self.head(self.norm(x[:, 1:].mean(dim=1)))
        return (logits, self.head_cls(self.norm_cls(x[:, 0]))) if self.training else logits
