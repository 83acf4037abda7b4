"""The computation the Evo-ViT authors published for LeViT, in plain PyTorch, written anew as the oracle of the tests.

It keeps what tokenops does otherwise: the patches are really sorted by their global score before every selection and
stay so, their first places travel with them until a subsampling sorts them back, attention matrices are written, and
what a stage adds to the representative token is summed branch by branch. Blocks are registered twice, for the whole
stages and for single layers, so a state dict holds them twice (github.com/YifanXu74/Evo-ViT).

`places` is the dtype in which the places travel: published are the tokens' dtype (for a bfloat16 model bfloat16).
"""

import torch
from torch import nn


class LinearBN(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.c, self.bn = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(self.c(x).transpose(1, 2)).transpose(1, 2)


class ConvBN(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.c, self.bn = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.c(x))


class Head(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn, self.l = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.l(self.bn(x))


class State:
    """What travels beside the tokens: global scores, first places; both in the tokens' present order."""

    def __init__(self, patches, batch, places, learn):
        self.g, self.learn = None, learn
        self.places = torch.arange(patches).to(places).repeat(batch, 1)

    def reorder(self, x, order):
        self.g, self.places = self.g.gather(1, order), self.places.gather(1, order)
        patches = x[:, 1:].gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2]))
        return torch.cat((x[:, :1], patches), dim=1)

    def t(self, module):
        return module.learn_tradeoff.sigmoid() if self.learn else 0.5


def attend(q, k, v, key_dim):
    """Heads (B, N, H, D) to (B, N, H*D) and the class token's row, averaged over the heads."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(2, 3) / key_dim**0.5, dim=3)
    return (weights @ v).transpose(1, 2).flatten(2), weights[:, :, 0].mean(dim=1)


class Attention(nn.Module):
    def __init__(self, dim, key_dim, heads):
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.qkv = LinearBN(dim, 4 * key_dim * heads)
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(2 * key_dim * heads, dim))

    def forward(self, x, state, merged):
        qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], self.heads, 4 * self.key_dim)
        q, k, v = qkv[..., : self.key_dim], qkv[..., self.key_dim : 2 * self.key_dim], qkv[..., 2 * self.key_dim :]
        y, row = attend(q, k, v, self.key_dim)
        row = row[:, 1:-1] if merged else row[:, 1:]
        if state.g is None:
            state.g = row
        else:
            t, n = state.t(self), row.shape[1]
            state.g = torch.cat(((1 - t) * state.g[:, :n] + t * row, state.g[:, n:]), dim=1)
        return self.proj(y)


class Residual(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def branch(self, x, state, merged):
        return self.m(x, state, merged) if isinstance(self.m, Attention) else self.m(x)

    def forward(self, x, state):
        return x + self.branch(x, state, merged=False)


def mlp(dim):
    return Residual(nn.Sequential(LinearBN(dim, 2 * dim), nn.Hardswish(), LinearBN(2 * dim, dim)))


def slow_fast(x, state, branches, keep):
    """Sort, merge the last, run the branches on the first, move the last with what they were merged to."""
    x = state.reorder(x, torch.sort(state.g, dim=1, descending=True, stable=True).indices)
    slow, fast, weights = x[:, : keep + 1], x[:, keep + 1 :], state.g[:, keep:]
    merged = (fast * (weights / weights.sum(dim=1, keepdim=True)).unsqueeze(2)).sum(dim=1, keepdim=True)
    z = torch.cat((slow, merged), dim=1)
    for branch in branches:
        added = branch.branch(z, state, merged=True)
        z, fast = z + added, fast + added[:, -1:]
    return torch.cat((z[:, :-1], fast), dim=1)


class CatModule(nn.Module):
    """A layer, chosen for by itself; keep None keeps every patch."""

    def __init__(self, m1, m2, keep):
        super().__init__()
        self.m1, self.m2, self.keep = m1, m2, keep

    def forward(self, x, state):
        if self.keep is None:
            return self.m2(self.m1(x, state), state)
        return slow_fast(x, state, (self.m1, self.m2), self.keep)


class StageModule(nn.Module):
    """All pruned branches of a stage."""

    def __init__(self, branches, keep):
        super().__init__()
        self.m, self.keep = nn.ModuleList(branches), keep

    def forward(self, x, state):
        return slow_fast(x, state, self.m, self.keep)


class AttentionSubsample(nn.Module):
    def __init__(self, dim, outputs, key_dim, grid):
        super().__init__()
        self.heads, self.key_dim, self.grid = dim // key_dim, key_dim, grid
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.poss = nn.Parameter(torch.randn(1, grid[0] * grid[1] + 1, dim))
        self.kv = LinearBN(dim, 5 * key_dim * self.heads)
        self.q = nn.Sequential(nn.Identity(), LinearBN(dim, key_dim * self.heads))
        self.proj = nn.Sequential(nn.Hardswish(), LinearBN(4 * key_dim * self.heads, outputs))

    def forward(self, x, state):
        before = state.g.sum(dim=1, keepdim=True)
        x = state.reorder(x, torch.sort(state.places, dim=1, stable=True).indices) + self.poss
        height, width = self.grid
        corner = [i * width + j for i in range(0, height, 2) for j in range(0, width, 2)]
        queries = self.q(x[:, [0] + [1 + place for place in corner]])
        batch, tokens, _ = x.shape
        kv = self.kv(x).reshape(batch, tokens, self.heads, 5 * self.key_dim)
        q = queries.reshape(batch, len(corner) + 1, self.heads, self.key_dim)
        y, row = attend(q, kv[..., : self.key_dim], kv[..., self.key_dim :], self.key_dim)
        t = state.t(self)
        g = (1 - t) * state.g[:, corner] + t * row[:, 1:][:, corner]
        state.g, state.places = g * before / g.sum(dim=1, keepdim=True), state.places[:, corner]
        return self.proj(y)


class PublishedEvoLeViT(nn.Module):
    def __init__(
        self,
        embed_dim,
        key_dim,
        num_heads,
        depth,
        img_size=(224, 224),
        keeping_ratio=(0.5, 0.5, 0.5),
        dense_layers=2,
        num_classes=1000,
        places=torch.int64,
    ):
        super().__init__()
        dim = embed_dim[0]
        widths = (3, dim // 8, dim // 4, dim // 2, dim)
        stem = [[ConvBN(a, b), nn.Hardswish()] for a, b in zip(widths, widths[1:])]
        self.patch_embed = nn.Sequential(*[part for pair in stem for part in pair][:-1])
        grid = img_size[0] // 16, img_size[1] // 16
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.poss = nn.Parameter(torch.randn(1, grid[0] * grid[1] + 1, dim))
        blocks, stages = [], []
        for i, dim in enumerate(embed_dim):
            keep, pruned = int(grid[0] * grid[1] * keeping_ratio[i]), []
            for layer in range(sum(depth[:i]), sum(depth[: i + 1])):
                m1, m2 = Residual(Attention(dim, key_dim, num_heads[i])), mlp(dim)
                dense = layer < dense_layers or keep == grid[0] * grid[1]
                blocks.append(CatModule(m1, m2, None if dense else keep))
                (stages if dense else pruned).extend((m1, m2))
            if pruned:
                stages.append(StageModule(pruned, keep))
            if i + 1 < len(embed_dim):
                between = [AttentionSubsample(dim, embed_dim[i + 1], key_dim, grid), mlp(embed_dim[i + 1])]
                blocks, stages = blocks + between, stages + between
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        self.blocks, self.stage_blocks = nn.ModuleList(blocks), nn.ModuleList(stages)
        self.head, self.head_dist = Head(dim, num_classes), Head(dim, num_classes)
        self.head_cls, self.head_cls_dist = Head(dim, num_classes), Head(dim, num_classes)
        self.places, self.stage_wise, self.learn = places, True, True

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        state = State(x.shape[1], x.shape[0], self.places, self.learn)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.poss
        for block in self.stage_blocks if self.stage_wise else self.blocks:
            x = block(x, state)
        cls, mean = x[:, 0], x[:, 1:].mean(dim=1)
        if self.training:
            return self.head(mean), self.head_dist(mean), self.head_cls(cls), self.head_cls_dist(cls)
        return (self.head(mean) + self.head_dist(mean)) / 2
