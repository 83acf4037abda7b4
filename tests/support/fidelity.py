"""Models whose answers stand in a table, and small ones of timm, for tests of fidelity."""

import timm
import torch
from torch import nn


class Table(nn.Module):
    """Images are numbers; embeddings are rows of a table, logits these times the rows of a head."""

    def __init__(self, rows, classes):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
        self.head = nn.Linear(self.rows.shape[1], len(classes), bias=False)
        self.head.weight.data = torch.tensor(classes, dtype=torch.float32)

    def forward(self, images):
        return self.head(self.rows[images])


class Dense(nn.Module):
    """Images are numbers; outputs are entries of a table."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(torch.as_tensor(outputs, dtype=torch.float32))

    def forward(self, images):
        return self.outputs[images]


IMAGES = torch.arange(4)
UNIT = [[1, 0], [0, 1]]


def small(**kwargs):
    torch.manual_seed(0)
    shape = dict(img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=7)
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **kwargs}).eval()


def images(count=6, size=64, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
