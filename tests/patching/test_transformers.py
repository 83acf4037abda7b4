"""What layers and models of transformers do that ViT, CLIP and SigLIP do not."""

import pytest
import torch

from support.patched_models import images
from support.weights import redrawn
from tokenops import apply_patch, remove_patch, tokens_left
from tokenops.patching.positions import Positions

transformers = pytest.importorskip("transformers")

from support.hf_models import SIZES  # noqa: E402


def model_of(kind, config=None, **kwargs):
    torch.manual_seed(0)
    name = config or kind.removesuffix("Model")
    return redrawn(getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**{**SIZES, **kwargs})))


@pytest.mark.parametrize("method, options", [("tome", dict(r=2)), ("evit", dict(keep_rate=0.5)), ("evo_vit", {})])
@pytest.mark.parametrize(
    "kind, more",
    [
        ("DINOv3ViTModel", {}),
        ("InternVLVisionModel", dict(use_qk_norm=True, image_size=[32, 32], patch_size=[8, 8])),
        ("Dinov2Model", {}),
        ("BeitModel", dict(use_relative_position_bias=True)),
    ],
)
def test_autocast(kind, more, method, options):
    model, x = model_of(kind, **more), images()
    apply_patch(model, method, **options)
    exact = model(x).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x).last_hidden_state
    assert found.shape == exact.shape and found.isfinite().all()
    found.float().square().mean().backward()


@pytest.mark.parametrize(
    "more", [{}, dict(use_relative_position_bias=True), dict(use_shared_relative_position_bias=True)]
)
def test_a_mask_is_no_bias(more):
    model, x = model_of("BeitModel", **more), images()
    apply_patch(model, "evit", keep_rate=0.5)
    model(x)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 9:] = 0
    with pytest.raises(ValueError, match="attention_mask was given to a patched model"):
        model(x, attention_mask=mask)


VIDEO = dict(num_frames=2, tubelet_size=2)


@pytest.mark.parametrize(
    "kind, more",
    [
        ("VideoMAEModel", VIDEO),
        ("BlipVisionModel", {}),
        ("InternVLVisionModel", dict(image_size=[32, 32], patch_size=[8, 8])),
        ("Dinov2Model", {}),
        ("SiglipVisionModel", {}),
    ],
)
def test_attention_weights_are_refused(kind, more):
    model = model_of(kind, **more, attn_implementation="eager")
    x = torch.randn(2, 2, 3, 32, 32) if kind.startswith("Video") else images()
    apply_patch(model, "tome", r=2)
    with pytest.raises(ValueError, match="output_attentions was given to a patched model"):
        model(x, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(x)


@pytest.mark.parametrize("kind, config", [("Data2VecVisionModel", None), ("FlavaImageModel", "FlavaImage")])
def test_hidden_states_of_layers_that_hand_on_tuples(kind, config):
    model, x = model_of(kind, config), images()
    expected = model(x, output_hidden_states=True).hidden_states
    apply_patch(model, "tome", r=2)
    states = model(x, output_hidden_states=True).hidden_states
    assert [type(state) for state in states] == [torch.Tensor] * 4
    assert [state.shape[1] for state in states] == [17, 15, 13, states[3].shape[1]]
    plain = model(x, output_hidden_states=True, return_dict=False)
    assert all(isinstance(state, torch.Tensor) for state in plain[-1])
    again = remove_patch(model)(x, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, again, expected))


def test_segmentation_on_layers_that_hand_on_tuples():
    torch.manual_seed(0)
    config = transformers.Data2VecVisionConfig(
        **{**SIZES, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], auxiliary_channels=8, pool_scales=[1, 2]
    )
    model, x = redrawn(transformers.Data2VecVisionForSemanticSegmentation(config)), images()
    expected = model(x).logits
    apply_patch(model, "tome", r=2)
    assert model(x).logits.shape == expected.shape and not torch.allclose(model(x).logits, expected, atol=1e-3)
    model.r = 0
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Data2VecVisionForSemanticSegmentation expects every patch token"):
        apply_patch(remove_patch(model), "evit", keep_rate=0.5)


class Prompted(transformers.ViTModel):
    """Prompts in a loop of its own."""

    def forward(self, pixel_values, **kwargs):
        x = self.embeddings(pixel_values)
        x = torch.cat((x[:, :1], torch.ones_like(x[:, :3]), x[:, 1:]), dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.layernorm(x)


def test_prompts_of_a_forward_of_ones_own():
    torch.manual_seed(0)
    model, x = redrawn(Prompted(transformers.ViTConfig(**SIZES))), images()
    with pytest.raises(ValueError, match="Prompted has a forward of its own, which may add tokens"):
        apply_patch(model, "evit", keep_rate=0.25)
    apply_patch(model, "evit", keep_rate=0.25, prefix=4)
    assert model(x).shape[1] == tokens_left(model).layers[-1] > 4


def test_a_signature_is_the_models_own():
    """By which trainers know what columns of a data set a model takes."""
    import inspect

    model = model_of("Dinov2Model")
    expected = inspect.signature(model.forward)
    assert inspect.signature(apply_patch(model, "tome", r=1).forward) == expected


@pytest.mark.parametrize("method, options", [("evit", dict(keep_rate=0.5)), ("tome", dict(r=2))])
def test_maps_of_two_encoders(method, options):
    inner = dict(
        model_type="dinov2", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8,
        mlp_ratio=2,
    )  # fmt: skip
    config = transformers.DepthProConfig(
        fusion_hidden_size=16, patch_size=32, intermediate_hook_ids=[3, 1], intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.25], scaled_images_feature_dims=[32, 16],
        image_model_config=inner, patch_model_config=inner, fov_model_config=inner, num_fov_head_layers=0,
    )  # fmt: skip
    model = redrawn(transformers.DepthProModel(config))
    with pytest.raises(ValueError, match="several vision transformers, .*patch_encoder"):
        apply_patch(model, method, **options)
    if method == "evit":
        with pytest.raises(ValueError, match="evit: DepthPro.* expects every patch token in its place"):
            apply_patch(model, method, module="encoder.patch_encoder", **options)
        return
    apply_patch(model, method, module="encoder.patch_encoder", **options)
    roles = [block.tokenops_role for block in model.modules() if hasattr(block, "tokenops_role")]
    assert [role.taken and role.mapped for role in roles] == [False, True, False, True]


def test_padding_is_of_no_size_in_a_mean():
    table = torch.tensor([[1.0], [2.0], [30.0], [40.0]])
    hidden = torch.tensor([[False, False, False, True, True]])
    found = Positions((table,), None, 1, hidden).mean(torch.tensor([[0, 0, 0, 1]]), 2)
    assert found.tables[0].tolist() == [[[[1.5], [0.0]]]]
    assert found.hidden.tolist() == [[False, False, True]]
