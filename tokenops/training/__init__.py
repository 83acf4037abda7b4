"""Training: objectives of every method, and one loop for a CPU, a GPU or many processes.

>>> import timm, torch
>>> from tokenops.training import Plain, fit
>>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_classes=2)
>>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
>>> history = fit(Plain(model), batches, epochs=2, lr=1e-3, progress=False, device="cpu")
>>> len(history.rows)
2
"""

try:
    import accelerate  # noqa: F401
    import rich  # noqa: F401
    import timm  # noqa: F401
except ImportError as missing:
    raise ImportError(f"tokenops.training needs more packages ({missing}): pip install 'tokenops[train]'") from missing

from .data import FolderImages, Images, TableImages, UnlabelledImages, loader_of, open_images, transform_for
from .distill import FeatureRecalibration, PatchRanking
from .evaluation import evaluate
from .loop import History, fit, learning_rate, model_of
from .objectives import Objective, Plain, ShrinkingKeepRate, SlowFast
from .pruning import Pruned

#: objectives by the names the command line has for them
OBJECTIVES: dict[str, type[Objective]] = {
    "plain": Plain,
    "frd": FeatureRecalibration,
    "evit": ShrinkingKeepRate,
    "evo_vit": SlowFast,
    "cait": Pruned,
    "dps": PatchRanking,
}

__all__ = [
    "OBJECTIVES",
    "FeatureRecalibration",
    "FolderImages",
    "History",
    "Images",
    "Objective",
    "PatchRanking",
    "Plain",
    "Pruned",
    "ShrinkingKeepRate",
    "SlowFast",
    "TableImages",
    "UnlabelledImages",
    "evaluate",
    "fit",
    "learning_rate",
    "loader_of",
    "model_of",
    "open_images",
    "transform_for",
]
