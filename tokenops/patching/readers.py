"""Who reads the tokens of a vision transformer: behind which blocks, and whether every patch must be in its place."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .modules import plain_of
from .trunks import pools_token

#: transformers' models that take nothing but the first tokens of the vision transformer in them
_CLASS = (
    "ASTForAudioClassification",
    "AltCLIPModel",
    "CLIPModel",
    "CLIPVisionModelWithProjection",
    "ChineseCLIPModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "MetaClip2Model",
    "MetaClip2VisionModelWithProjection",
    "OwlViTModel",
    "Owlv2Model",
    "ViTForImageClassification",
    "ViTMSNForImageClassification",
    "VisionTextDualEncoderModel",
    "VivitForVideoClassification",
    "YolosForObjectDetection",
)
#: those with a language model that takes patch tokens in no grid: as many as the prompt has places for, or any number
#: that a few queries attend to
_COUNTING = ("LlavaModel", "VipLlavaModel", "PaliGemmaModel", "DeepseekVLModel")
_QUERYING = (
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Model",
    "Blip2VisionModelWithProjection",
    "InstructBlipForConditionalGeneration",
    "InstructBlipModel",
)
#: those that pool by a mask of all patches, and wrappers that make maps of timm's models
_MASKING = ("Siglip2VisionModel",)
_OF_TIMM = ("FeatureGetterNet", "TimmBackbone")
#: what the names of classes have in them that make a map, or a value for every patch
_MAPPING = (
    "DepthEstimation",
    "DepthPro",
    "ForPreTraining",
    "ImageMatting",
    "ImageSegmentation",
    "MaskedImageModeling",
    "ObjectDetection",
    "PoseEstimation",
    "SemanticSegmentation",
    "SuperResolution",
)


class Reader(NamedTuple):
    """What a model does with the tokens of the vision transformer in it.

    Attributes:
        taken: the blocks behind which it takes them, mostly the last; -1 is before the first.
        maps: the class that expects every patch token in its place; None without.
        speaker: the innermost model around with a prompt that has places for images; None without.
    """

    taken: tuple[int, ...]
    maps: str | None
    speaker: Any


def reader_of(owner: Any, around: Sequence[Any], depth: int) -> Reader:
    """What becomes of the tokens of a vision transformer.

    Args:
        owner: this.
        around: the modules around it, from the outside.
        depth: how many blocks it has.
    """
    speaker = next((module for module in reversed(around) if _has_places(module)), None)
    if speaker is not None:
        kind, taken = type(speaker).__name__, _of_speaker(speaker.config, depth)
        free = kind in (*_COUNTING, *_QUERYING) and len(taken) == 1
        return Reader(taken, None if free else kind, speaker)
    layers, maps = {depth - 1}, None
    for module in (owner, *reversed(around)):
        kind = plain_of(module).__name__
        if kind in _MASKING or (module is not owner and kind in _OF_TIMM):
            maps = maps or kind
        elif kind.endswith("Backbone") and hasattr(module, "out_indices"):
            layers |= {i - 1 for i in _from_end(module.out_indices, 1 + depth)}
            shaped = getattr(module.config, "reshape_hidden_states", False) or module is not (*around, owner)[0]
            maps = maps or (kind if shaped else None)
        elif module is not owner and any(part in kind for part in _MAPPING) and not kind.startswith("Yolos"):
            layers |= {layer for name, found in _LAYERS.items() for layer in found(getattr(module.config, name, ()))}
            maps = maps or kind
    return Reader(tuple(sorted(layers)), maps, None)


def pools_class(owner: Any, around: Sequence[Any], has_class: bool, speaker: Any) -> bool:
    """Whether a model, as it is now, classifies by tokens of the prefix alone."""
    if not has_class or speaker is not None or getattr(getattr(owner, "config", None), "use_mean_pooling", False):
        return False
    pools = pools_token(owner)
    if pools is not None:
        return pools
    return not around or plain_of(around[-1]).__name__ in _CLASS


def passed_by(speaker: Any) -> int:
    """How many of the first tokens a language model does not take."""
    strategy = getattr(getattr(speaker, "config", None), "vision_feature_select_strategy", None)
    return int(strategy == "default" or type(speaker).__name__ == "VipLlavaModel")


#: where configurations of models that make maps say whose tokens they take: the blocks, from 0
_LAYERS: dict[str, Callable[[Any], Any]] = {
    "backbone_out_indices": lambda layers: layers or (),
    "extract_layers": lambda layers: layers,
    "intermediate_hook_ids": lambda layers: layers or (),
    "out_indices": lambda layers: [i - 2 for i in layers or ()],
}


def _has_places(module: Any) -> bool:
    """Whether it is a model of transformers that puts image tokens into places of a prompt."""
    config = getattr(module, "config", None)
    return hasattr(config, "image_token_id") or hasattr(config, "image_token_index")


def _of_speaker(config: Any, depth: int) -> tuple[int, ...]:
    """The blocks whose hidden states become image tokens; -1 for what comes into the first."""
    layers = getattr(config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else layers
    if hasattr(config, "spatial_vision_layer"):  # Granite's, which takes these in place of the other
        layers = [config.spatial_vision_layer, *(layer for layer, _ in config.deepstack_layer_map or ())]
    return tuple(sorted({i - 1 for i in _from_end(layers, 1 + depth)}))


def _from_end(numbers: Sequence[int], count: int) -> list[int]:
    """Numbers of things, where those below 0 count from the last of so many."""
    return [i % count for i in numbers]
