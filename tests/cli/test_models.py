"""Where models come from beside timm's names, and images of more than 8 bits."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import tokenops
from support.commands import parsed, run
from tokenops.cli import CommandError, bench, models, slim
from tokenops.patching.images import open_rgb

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
VISION = dict(image_size=64, patch_size=16, **SIZES)


def vit(folder):
    transformers = pytest.importorskip("transformers")
    transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=7, **VISION)).save_pretrained(folder)
    how = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))


def clip(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config=VISION, text_config=SIZES, num_labels=7)
    transformers.CLIPForImageClassification(config).save_pretrained(folder)


def of_timm(folder):
    import timm

    sizes = dict(img_size=64, depth=3, num_classes=7)
    timm.models.save_for_hf(timm.create_model("deit_tiny_patch16_224", **sizes), folder, model_args=sizes)


def vit_without_a_head(folder):
    transformers = pytest.importorskip("transformers")
    transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "classes", "random"),
    [(vit, 3, True), (vit, 7, False), (of_timm, 3, True), (of_timm, 7, False), (vit_without_a_head, 2, True)],
)
def test_a_head_without_weights_is_called_random(save, classes, random, tmp_path):
    save(tmp_path)
    _, weights = models.make(parsed(bench, "--model", tmp_path, "--num-classes", classes))
    assert weights == f"{tmp_path}{', its head random' if random else ''}"
    assert models.trained(weights) is not random


def test_a_head_without_published_weights_is_called_random(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: create(name, **kwargs))
    for flags, random in (([], False), (["--num-classes", 3], True)):
        made = models.make(parsed(bench, "--model", "vit_tiny_patch16_224", "--pretrained", *flags))
        assert made.weights == f"published weights{', its head random' if random else ''}"


@pytest.mark.parametrize("save", [vit, clip, of_timm])
def test_a_folder_brings_its_weights_and_takes_every_method_of_its_kind(save, tmp_path):
    save(tmp_path)
    arguments = ["--model", tmp_path, "--device", "cpu"]
    dense, weights = models.make(parsed(bench, *arguments))
    again, _ = models.make(parsed(bench, *arguments))
    x = torch.randn(2, 3, 64, 64)
    assert weights == str(tmp_path) and models.input_size(dense) == (3, 64, 64)
    torch.testing.assert_close(dense(x), again(x), rtol=0, atol=0)
    assert dense(x).shape == (2, 7) and dense.num_classes == 7
    reduced, _ = models.make(parsed(bench, *arguments, "--method", "evit", "--keep-rate", "0.5"))
    assert models.counted(dense, x[:1]).tokens == [17, 17, 17]
    assert models.counted(reduced, x[:1]).macs < 0.9 * models.counted(dense, x[:1]).macs
    assert [step.tokens for step in tokenops.trace(reduced, x).steps] == [10, 7, 5]
    name, plain = models.dense_of(reduced, parsed(bench, *arguments, "--method", "evit"))
    torch.testing.assert_close(plain(x), dense(x))


def test_a_folder_says_how_images_are_prepared(tmp_path):
    vit(tmp_path)
    model, _ = models.make(parsed(bench, "--model", tmp_path))
    found = models.prepared(model, [Image.new("RGB", (90, 30), (255, 0, 51))])
    torch.testing.assert_close(found[0, :, 5, 5], torch.tensor([(1 - 0.1) / 0.4, -0.2 / 0.5, (0.2 - 0.3) / 0.6]))


def test_a_folder_for_other_classes(tmp_path, capfd):
    vit(tmp_path)
    capfd.readouterr()
    model, _ = models.make(parsed(bench, "--model", tmp_path, "--num-classes", 3))
    assert capfd.readouterr().err == "", "what transformers tells is said by the command"
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3) and model.num_classes == 3


def test_slim_of_a_folder(tmp_path, capsys):
    vit(tmp_path)
    arguments = ["--device", "cpu", "--repeats", 1, "--output", tmp_path / "slim.png"]
    run(slim, "--model", tmp_path, *arguments)
    out = " ".join(capsys.readouterr().out.split())
    assert "17 x 3; slim 17, 14, 12" in out and "top 5 of the slim model" in out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "bert"}', "its model_type is 'bert', but it must be of timm, or beit, clip, data2vec"),
        ('{"architecture": "vit_tinny"}', "cannot make local-dir:"),
        ('{"model_type": "vit"}', "no file named model.safetensors"),
        ("no json", "a folder of a model needs its config.json"),
        ("[1, 2]", "it must be an object, but is [1, 2]"),
        (None, "a folder of a model needs its config.json"),
    ],
)
def test_a_folder_that_cannot_be_taken_is_refused_in_one_line(config, words, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CommandError) as error:
        models.make(parsed(bench, "--model", tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_to_resume_from_is_not_taken_for_weights(tmp_path):
    torch.save({"tokenops": 1, "objective": {}, "optimizers": []}, tmp_path / "last.pt")
    with pytest.raises(CommandError, match=r"last\.pt is a checkpoint to resume from: take model\.pt beside it"):
        models.make(parsed(bench, "--checkpoint", tmp_path / "last.pt"))


@pytest.mark.parametrize(
    ("model", "flags"), [("hf-hub:nobody/nothing", []), ("vit_tiny_patch16_224", ["--pretrained"])]
)
def test_without_the_net_it_says_so_in_one_line(model, flags, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CommandError, match=f"{(flags or ['--model'])[0]}: the weights of {model} cannot be") as error:
        models.make(parsed(bench, "--model", model, *flags))
    assert "(no connection to the hub, and not in its cache)" in str(error.value)
    assert "\n" not in str(error.value) and "give a folder, or a --checkpoint" in str(error.value)


# ---- images


def saved(pixels, path):
    Image.fromarray(pixels).save(path)
    return path


def test_16_bits_are_scaled(tmp_path):
    """Pillow's own conversion makes everything above 255 white."""
    grey = np.array([[0, 257 * 10], [257 * 200, 65535]], dtype=np.uint16)
    for suffix in (".png", ".tif"):
        found = np.asarray(open_rgb(saved(grey, tmp_path / f"grey{suffix}")))
        assert found[..., 0].tolist() == [[0, 10], [200, 255]] and (found == found[..., :1]).all()
    found = np.asarray(open_rgb(saved(grey.astype(np.int32), tmp_path / "whole.tif")))
    assert found[..., 1].tolist() == [[0, 10], [200, 255]]
    dark = np.asarray(open_rgb(saved(np.full((2, 2), 255, dtype=np.uint16), tmp_path / "dark.png")))
    assert (dark == 1).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_what_goes_to_255_counts_as_8_bits(tmp_path, dtype):
    pixels = np.array([[0, 2], [200, 255]], dtype=dtype)
    assert np.asarray(open_rgb(saved(pixels, tmp_path / "a.tif")))[..., 0].tolist() == [[0, 2], [200, 255]]


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    """Pillow's own conversion makes all of the first black."""
    pixels = np.array([[0.0, 0.2], [0.6, 1.0]], dtype=np.float32)
    assert np.asarray(open_rgb(saved(pixels, tmp_path / "a.tif")))[..., 2].tolist() == [[0, 51], [153, 255]]
    for wrong in (300 * pixels, -pixels, pixels * np.float32("nan")):
        path = saved(wrong.astype(np.float32), tmp_path / "b.tif")
        with pytest.raises(ValueError, match="its pixels are floats from .* but must be from 0 to 255"):
            open_rgb(path)
        with pytest.raises(CommandError, match=r"cannot read .*b\.tif: its pixels are floats"):
            models.open_image(path)
    with pytest.raises(ValueError, match="whole numbers from -5 to 70000, but must be from 0 to 65535"):
        open_rgb(saved(np.array([[-5, 70000]], dtype=np.int32), tmp_path / "c.tif"))


def test_images_of_8_bits_are_pillows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (np.asarray(open_rgb(saved(pixels, tmp_path / "a.png"))) == pixels).all()
    half = io.BytesIO((tmp_path / "a.png").read_bytes()[:6000])
    with pytest.raises(OSError):
        open_rgb(half)


def test_training_reads_them_the_same_way(tmp_path):
    """And says of the first what is wrong with all."""
    pytest.importorskip("accelerate")
    from tokenops.training import FolderImages

    (tmp_path / "a").mkdir()
    saved(np.full((4, 4), 257 * 77, dtype=np.uint16), tmp_path / "a" / "0.png")
    images = FolderImages(tmp_path, train=True, transform=np.asarray)
    assert (images[0][0] == 77).all()
    saved(np.full((4, 4), -7.5, dtype=np.float32), tmp_path / "a" / "0.tif")
    (tmp_path / "a" / "0.png").unlink()
    images = FolderImages(tmp_path, train=True, transform=np.asarray)
    with pytest.raises(OSError, match="none of 1 images can be read, as a/0.tif: its pixels are floats from -7.5"):
        images[0]
