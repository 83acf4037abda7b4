"""Architectures of timm, transformers, torchvision and open_clip, each small and random, tried with every method."""
