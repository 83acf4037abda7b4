"""A processor that makes as many image tokens as a patched tower leaves.

It sets what transformers' processors count by, and needs nothing of transformers itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..patching.counts import TokensLeft, tokens_left
from ..patching.site import Site


class _Pair(NamedTuple):
    """A kind of processor.

    Attributes:
        models: the models it is for.
        fit: gives it what it counts by, from the model's config and the tokens of an image.
        any_size: whether the tower takes images of any size, so that the processor's is the one that counts.
    """

    models: tuple[str, ...]
    fit: Callable[[Any, Any, TokensLeft], None]
    any_size: bool = False


def fit_processor(processor: Any, model: Any) -> Any:
    """Have a processor make as many image tokens as the model's projector gives for an image; returns it.

    In place, in the attributes that the processor counts by, so it copies, pickles and saves as before, and one that is
    loaded again still fits. The number follows the model as it is now: fit it again where the method or its setting
    (``model.r``) has changed, or behind `tokenops.remove_patch`.

    - LLaVA, ViP-LLaVA: ``num_additional_image_tokens``, below 0 where tokens are left out, with ``patch_size`` and
      ``vision_feature_select_strategy``.
    - PaliGemma, ColPali: ``image_seq_length``, of its image processor too; DeepSeek-VL: ``num_image_tokens``.
    - Those that make a grid of the tokens, which `tokenops.apply_patch` gives every patch a token again, count as the
      unpatched model does: LLaVA-NeXT, LLaVA-OneVision, Gemma 3 (``image_seq_length``), Idefics3 and SmolVLM
      (``image_seq_len``), InternVL (``image_seq_length``).

    Args:
        processor: transformers' for the model.
        model: the language model with its tower, behind `tokenops.apply_patch` of itself; or not patched.

    Raises:
        TypeError: the processor is none of these or not for the model, or the model has no tower that can be patched.
        ValueError: the processor's images are of another size than the tower's.
    """
    kinds = [kind.__name__ for kind in type(processor).__mro__ if kind.__name__ in _PAIRS]
    if not kinds:
        raise TypeError(
            f"processor is a {type(processor).__name__}, but fit_processor knows {', '.join(_PAIRS)}: set its number of"
            " image tokens to tokenops.tokens_left(model).output where the projector keeps as many"
        )
    pair, site = _PAIRS[kinds[0]], Site(model)
    speaker = type(site.speaker).__name__
    if speaker not in pair.models:
        what = f"one with a {speaker}" if site.speaker is not None else "no language model"
        raise TypeError(
            f"a {type(processor).__name__} is for {' or '.join(pair.models)}, but the model is {what}: give the whole"
            " model, and its own processor"
        )
    size = _image_size(processor)
    if size is not None and not pair.any_size and size != tuple(site.img_size or size):
        raise ValueError(
            f"the processor makes images of {size[0]} x {size[1]} pixels, but the tower takes"
            f" {' x '.join(map(str, site.img_size or ()))}: set the size of its image processor"
        )
    pair.fit(processor, site.speaker.config, tokens_left(model, size if pair.any_size else None))
    return processor


def _image_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of the images, or crops of one, that a processor makes; None where it does not say."""
    images = getattr(processor, "image_processor", None)
    if cut := getattr(images, "max_image_size", None):
        return cut["longest_edge"], cut["longest_edge"]
    crop = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else None
    for size in (crop, getattr(images, "size", None)):
        if size and size.get("height") and size.get("width"):
            return size["height"], size["width"]
    return None


def _by_patches(processor: Any, config: Any, left: TokensLeft) -> None:
    """From the patches of an image, and how many more there are."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    strategy = getattr(config, "vision_feature_select_strategy", processor.vision_feature_select_strategy)
    processor.patch_size, processor.vision_feature_select_strategy = patch, strategy
    processor.num_additional_image_tokens = left.output + int(strategy == "default") - (side // patch) ** 2


def _by_grid(processor: Any, config: Any, left: TokensLeft) -> None:
    """From the number of patches, of which the root is taken."""
    strategy = config.vision_feature_select_strategy
    processor.num_image_tokens = left.output + int(strategy == "default")
    processor.vision_feature_select_strategy = strategy


def _as_they_are(processor: Any, config: Any, left: TokensLeft) -> None:
    processor.image_seq_length = processor.image_processor.image_seq_length = left.output


def _counted(processor: Any, config: Any, left: TokensLeft) -> None:
    processor.num_image_tokens = left.output


def _averaged(processor: Any, config: Any, left: TokensLeft) -> None:
    """Means over windows of the grid, which the config says the number of."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    count = (side // (side // int(config.mm_tokens_per_image**0.5))) ** 2
    tokenizer = processor.tokenizer
    inner = f"{tokenizer.boi_token}{tokenizer.image_token * count}{tokenizer.eoi_token}"
    processor.image_seq_length, processor.full_image_sequence = count, f"\n\n{inner}\n\n"


def _shuffled(processor: Any, config: Any, left: TokensLeft) -> None:
    """Squares of patches that become one token."""
    processor.image_seq_len = left.output // config.scale_factor**2


def _downsampled(processor: Any, config: Any, left: TokensLeft) -> None:
    processor.image_seq_length = int(left.output * config.downsample_ratio**2)


_PAIRS = {
    "LlavaProcessor": _Pair(("LlavaModel", "VipLlavaModel"), _by_patches),
    "LlavaNextProcessor": _Pair(("LlavaNextModel",), _by_patches),
    "LlavaOnevisionProcessor": _Pair(("LlavaOnevisionModel",), _by_grid),
    "PaliGemmaProcessor": _Pair(("PaliGemmaModel",), _as_they_are),
    "ColPaliProcessor": _Pair(("PaliGemmaModel",), _as_they_are),
    "DeepseekVLProcessor": _Pair(("DeepseekVLModel",), _counted),
    "Gemma3Processor": _Pair(("Gemma3Model",), _averaged),
    "Idefics3Processor": _Pair(("Idefics3Model",), _shuffled, any_size=True),
    "SmolVLMProcessor": _Pair(("SmolVLMModel",), _shuffled, any_size=True),
    "InternVLProcessor": _Pair(("InternVLModel",), _downsampled),
}
