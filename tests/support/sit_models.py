"""Small SiT models for the tests, and their training's forward pass."""

import timm
from torch import nn

import tokenops.methods  # noqa: F401
from support.weights import spread
from tokenops.nn import ReverseTokenSlimming
from tokenops.patching.site import Site
from tokenops.patching.views import patches_behind

TINY = dict(embed_dim=32, num_heads=2, stage_blocks=(1, 1, 2), img_size=64, num_classes=5)


def tiny(name="sit_lvvit_xsmall", **kwargs):
    return spread(timm.create_model(name, **{**TINY, **kwargs})).eval()


def slimmings(model):
    return [block.slimming for block in model.blocks if hasattr(block, "slimming")]


def slim_after(model):
    return [i - 1 for i, block in enumerate(model.blocks) if hasattr(block, "slimming")]


class Distilled(nn.Module):
    """A model and reverse modules, as `tokenops.training.FeatureRecalibration` has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        patches, dim, left = model.patch_embed.num_patches, model.embed_dim, model.patch_embed.num_patches
        reverse = []
        for i in range(len(model.blocks)):
            if i in slim_after(model):
                left = model.blocks[i + 1].slimming.slim_tokens
            reverse.append(nn.Identity() if left == patches else ReverseTokenSlimming(dim, left, patches))
        self.rtsm = nn.ModuleList(reverse)

    def load_published(self, state):
        """Weights under the published names, those of the reverse modules among them."""
        self.model.load_state_dict(state, strict=True)
        rtsm = {key.removeprefix("rtsm."): value for key, value in state.items() if key.startswith("rtsm.")}
        self.rtsm.load_state_dict(rtsm, strict=True)

    def forward(self, x):
        with patches_behind(Site(self.model)) as layers:
            logits = self.model(x)
        return logits, [reverse(tokens) for reverse, tokens in zip(self.rtsm, layers, strict=True)]


def loss_and_gradients(module, x):
    """Of a `Distilled`, or of what returns as much; gradients under the names of the published checkpoints."""
    module.zero_grad()
    logits, layers = module(x)
    loss = logits.square().mean() + sum(layer.square().mean() for layer in layers)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), {published_name(module, name): grad for name, grad in grads.items()}


def published_name(module, name):
    if isinstance(module, Distilled):
        name = name.removeprefix("model.")
        for j, i in enumerate(slim_after(module.model)):
            name = name.replace(f"blocks.{i + 1}.slimming.", f"tsm.{j}.")
    return name
