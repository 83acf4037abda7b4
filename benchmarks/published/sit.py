"""The computation the SiT authors published, in plain PyTorch, written anew as the oracle of the tests.

It keeps what tokenops does otherwise: eager attention on fp32 copies of q, k and v, a split and a cat around every
block, softmax over dim 1 and bmm, transposes around the RTSM's token MLP, and it returns (logits, logits, tokens) in
training. Parameter names are those of the published checkpoints (github.com/Sense-X/SiT).
"""

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (t.float() for t in qkv)
        weights = torch.softmax((q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio, qkv_bias, skip_lam, eps):
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = Attention(dim, heads, qkv_bias), Mlp(dim, int(dim * mlp_ratio), dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) / self.skip_lam
        return x + self.mlp(self.norm2(x)) / self.skip_lam


class Stem4(nn.Module):
    """Four strided convolutions."""

    def __init__(self, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim // 8, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(dim // 8, dim // 4, 3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(dim // 4, dim // 2, 3, 2, 1, bias=False)
        self.conv4 = nn.Conv2d(dim // 2, dim, 3, 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(dim // 8), nn.BatchNorm2d(dim // 4)
        self.bn3, self.bn4 = nn.BatchNorm2d(dim // 2), nn.BatchNorm2d(dim)
        self.gelu = nn.GELU()

    def forward(self, x):
        x = self.gelu(self.bn1(self.conv1(x)))
        x = self.gelu(self.bn2(self.conv2(x)))
        x = self.gelu(self.bn3(self.conv3(x)))
        return self.bn4(self.conv4(x))


class Stem6(nn.Module):
    """Two more convolutions, with stride 1, behind the first."""

    def __init__(self, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim // 8, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(dim // 8, dim // 8, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(dim // 8, dim // 8, 3, 1, 1, bias=False)
        self.conv4 = nn.Conv2d(dim // 8, dim // 4, 3, 2, 1, bias=False)
        self.conv5 = nn.Conv2d(dim // 4, dim // 2, 3, 2, 1, bias=False)
        self.conv6 = nn.Conv2d(dim // 2, dim, 3, 2, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(dim // 8) for _ in range(3))
        self.bn4, self.bn5, self.bn6 = nn.BatchNorm2d(dim // 4), nn.BatchNorm2d(dim // 2), nn.BatchNorm2d(dim)
        self.gelu = nn.GELU()

    def forward(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.gelu(norm(conv(x)))
        x = self.gelu(self.bn4(self.conv4(x)))
        x = self.gelu(self.bn5(self.conv5(x)))
        return self.bn6(self.conv6(x))


class PlainStem(nn.Module):
    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 16, 16)

    def forward(self, x):
        return self.proj(x)


class Slimming(nn.Module):
    def __init__(self, dim, keep):
        super().__init__()
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, keep))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x):
        weights = torch.softmax(self.weight(x) * self.scale, dim=1)
        return torch.bmm(weights.transpose(2, 1), x)


class Reverse(nn.Module):
    def __init__(self, dim, keep, tokens):
        super().__init__()
        self.norm1, self.mlp1 = nn.LayerNorm(dim), Mlp(keep, 4 * tokens, tokens)
        self.norm2, self.mlp2 = nn.LayerNorm(dim), Mlp(dim, 4 * dim, dim)

    def forward(self, x):
        x = self.mlp1(self.norm1(x).transpose(2, 1)).transpose(2, 1)
        return x + self.mlp2(self.norm2(x))


class PublishedSiT(nn.Module):
    """`slim=False` is the teacher: the same network without slimming."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        stage_blocks,
        slim=True,
        img_size=224,
        stem="conv4",
        mlp_ratio=3.0,
        qkv_bias=False,
        skip_lam=1.0,
        norm_eps=1e-5,
        aux_head=True,
        num_classes=1000,
    ):
        super().__init__()
        tokens, depth = (img_size // 16) ** 2, sum(stage_blocks)
        self.patch_embed = {"conv4": Stem4, "conv6": Stem6, "linear": PlainStem}[stem](3, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, tokens + 1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, skip_lam, norm_eps) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(embed_dim, eps=norm_eps), nn.Linear(embed_dim, num_classes)
        if aux_head:
            self.aux_head = nn.Linear(embed_dim, num_classes).requires_grad_(False)
        self.slim = slim
        if slim:
            ends = [sum(stage_blocks[: i + 1]) for i in range(len(stage_blocks))]
            keeps = [int(tokens * 0.5**i) for i in range(len(stage_blocks))]
            self.slim_after = {end: i for i, end in enumerate(ends[:-1])}
            self.tsm = nn.ModuleList(Slimming(embed_dim, keep) for keep in keeps[1:])
            after = [keeps[sum(i >= end for end in ends[:-1])] for i in range(1, depth + 1)]
            self.rtsm = nn.ModuleList(
                Reverse(embed_dim, keep, tokens) if keep < tokens else nn.Identity() for keep in after
            )

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            cls, tokens = x[:, 0:1], x[:, 1:]
            if self.slim:
                if i + 1 in self.slim_after:
                    tokens = self.tsm[self.slim_after[i + 1]](tokens)
                x = torch.cat((cls, tokens), dim=1)
                if self.training:
                    tokens = self.rtsm[i](tokens)
            layers.append(tokens)
        logits = self.head(self.norm(x)[:, 0])
        return (logits, logits, layers) if self.training else (logits, layers)
