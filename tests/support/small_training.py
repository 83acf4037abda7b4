"""A small classifier, data for it, and options of `fit`, for the tests of training."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

QUIET = dict(progress=False, device="cpu")


class Small(nn.Module):
    """A classifier of 8 x 8 images with dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.fc = nn.Linear(192, 16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(F.gelu(self.fc(x.flatten(1)))))


class Noisy(Dataset):
    """Images that are augmented with the global generators."""

    def __init__(self, length=24):
        self.images, self.labels = torch.randn(length, 3, 8, 8), torch.arange(length) % 3

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i] * random.random() + float(np.random.rand()) + torch.randn(()), int(self.labels[i])


def images(length=24):
    return TensorDataset(torch.randn(length, 3, 8, 8), torch.arange(length) % 3)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
