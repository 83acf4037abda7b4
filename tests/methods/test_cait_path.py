"""CAIT's whole path in small: merge and prune while training, compact, save and load, export twice, segment."""

import copy

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F

import tokenops
from tokenops.methods.cait.blocks import prunable
from tokenops.methods.cait.pruning import ChannelPruner
from tokenops.methods.cait.segmentation import SegmentationModel
from tokenops.methods.cait.structure import Structure, load_compressed, macs, save_compressed
from tokenops.training import Pruned, fit

MULTIPLES = {"qk": 4, "v": 4, "hidden": 16}


def dense():
    """3 blocks of 2 heads with 16 channels on an 8 x 8 grid."""
    arguments = dict(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=4)
    return timm.models.VisionTransformer(**arguments).eval()


def batches(pixels=False):
    """Which of four directions each image, or its every pixel, points to."""
    images = torch.randn(6, 8, 3, 32, 32)
    places = images[:, :, :2] if pixels else images[:, :, :2].mean((3, 4))
    return [(x, (p[:, 0] > 0) + 2 * (p[:, 1] > 0)) for x, p in zip(images, places)]


def check_exports(model, x, folder):
    """torch.export's program and ONNX Runtime say what the model says; nothing of ours is in either."""
    expected = model(x)
    with tokenops.use_backend("reference"), torch.no_grad():
        program = torch.export.export(model, (x,))
        onnx = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert not any("tokenops" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    again = torch.export.load(_saved(program, folder / "model.pt2")).module()(x)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    onnx.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (there,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(there, expected.numpy(), rtol=1e-4, atol=1e-4)


def _saved(program, path):
    torch.export.save(program, path)
    return path


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_path(tmp_path):
    with torch.enable_grad():
        teacher, model = dense(), dense()
        model.load_state_dict(teacher.state_dict())
        prunable(tokenops.apply_patch(model, "cait", kind="channel", layout="block"))
        pruner = ChannelPruner(model, 0.6, steps=(2, 8), every=2, multiples=MULTIPLES)
        cost = macs(model)
        objective = Pruned(model, pruner, teacher=teacher, smoothing=0.1)
        fit(objective, batches(), epochs=2, lr=1e-3, min_lr=0.0, clip=1.0, progress=False, device="cpu")
    small = objective.model.eval()
    assert objective.compacted_at == 8 and macs(small) <= 0.6 * cost and macs(small) < 0.5 * macs(teacher)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in teacher.parameters())

    save_compressed(small, tmp_path / "compressed")
    loaded = load_compressed(dense(), tmp_path / "compressed").eval()
    assert Structure.of(loaded) == Structure.of(small)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), small(x)) and not torch.allclose(small(x), teacher(x), atol=1e-3)
    check_exports(loaded, x, tmp_path)

    segmenter = SegmentationModel(loaded, (0, 2), 4, width=16, detail=4).train()
    before = copy.deepcopy(segmenter.state_dict())
    with torch.enable_grad():
        for x, labels in batches(pixels=True)[:2]:
            loss = F.cross_entropy(segmenter(x), labels)
            loss.backward()
        torch.optim.AdamW(segmenter.parameters(), 1e-3).step()
    same = {name for name, value in segmenter.state_dict().items() if torch.equal(value, before[name])}
    assert not any(name.startswith("backbone.blocks") and name.endswith("weight") for name in same)
    assert F.cross_entropy(segmenter(x), labels) < loss
    check_exports(segmenter.eval(), x[:2], tmp_path)
