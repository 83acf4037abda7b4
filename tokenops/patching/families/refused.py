"""Why models of other designs take no method: by the modules that define them, what a reader can check there."""

_WINDOWS = "its attention is within windows of a map, in which every token must be in its place in every block"
_POOLS = "its stages shrink a map of tokens on the grid, for which every token must be in its place"
_STRIDED = "its keys and values are made by strided convolutions over a map, in which every token must be in its place"
_CONVOLVED = "its blocks have convolutions over a map, in which every token must be in its place"
_MAPS = "it is a network of convolutions, which have no tokens that could be fewer"
_FIXED = "its tokens are mixed by a layer that has weights for every place, so there are always as many"
_SAM = "its windowed blocks take a map with every token in its place, so no block may hand on fewer"
_DIFFERENCE = "it is the difference of two softmaxes, which leaves a token no share of attention to be chosen by"
_NEIGHBOURS = "its attention is between neighbours on the grid, where every token must be in its place"

#: the beginnings of classes' full names, to what makes these models ones that cannot be patched
REFUSED: dict[str, str] = {
    "timm.layers.diff_attention.": _DIFFERENCE,
    "timm.models.coat.": "its attention encodes positions by convolutions over a map",
    "timm.models.convit.": "its attention mixes a softmax of content, by a gate, with one of places on the whole grid",
    "timm.models.convmixer.": _MAPS,
    "timm.models.convnext.": _MAPS,
    "timm.models.crossvit.": "two sequences, of small and of large patches, swap their class tokens in every block",
    "timm.models.davit.": _WINDOWS,
    "timm.models.edgenext.": _CONVOLVED,
    "timm.models.efficientformer.": "its attention has a bias for every two places of one grid",
    "timm.models.efficientformer_v2.": _CONVOLVED,
    "timm.models.efficientnet.": _MAPS,
    "timm.models.fastvit.": _CONVOLVED,
    "timm.models.focalnet.": "it has no attention: neighbours on a map modulate each other by convolutions",
    "timm.models.gcvit.": _WINDOWS,
    "timm.models.hiera.": "its stages pool tokens by mask units of the grid, which lose their neighbours",
    "timm.models.hieradet_sam2.": _WINDOWS,
    "timm.models.levit.": (
        "its attention has a bias for every two places of the grid, and subsamples these; its own form of Evo-ViT is in"
        " tokenops.methods"
    ),
    "timm.models.maxxvit.": _WINDOWS,
    "timm.models.metaformer.": "its tokens are a map, whose neighbours are pooled or convolved in place of attention",
    "timm.models.mlp_mixer.": _FIXED,
    "timm.models.mobilenetv3.": _MAPS,
    "timm.models.mobilevit.": "its tokens are unfolded from a map and folded back for convolutions, in every block",
    "timm.models.mvitv2.": "its queries, keys and values are pooled on a map in every block",
    "timm.models.nest.": _WINDOWS,
    "timm.models.nextvit.": _CONVOLVED,
    "timm.models.nfnet.": _MAPS,
    "timm.models.pit.": _POOLS,
    "timm.models.pvt_v2.": _STRIDED,
    "timm.models.regnet.": _MAPS,
    "timm.models.repvit.": _MAPS,
    "timm.models.resnet.": _MAPS,
    "timm.models.resnetv2.": _MAPS,
    "timm.models.sequencer.": "it has no attention: recurrent layers run over rows and columns of a map",
    "timm.models.swin_transformer.": _WINDOWS,
    "timm.models.swin_transformer_v2.": _WINDOWS,
    "timm.models.swin_transformer_v2_cr.": _WINDOWS,
    "timm.models.tiny_vit.": _WINDOWS,
    "timm.models.tnt.": "every block has attention between the pixels of each patch, too, in step with the patches",
    "timm.models.twins.": _WINDOWS,
    "timm.models.vgg.": _MAPS,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _DIFFERENCE,
    "timm.models.vision_transformer_sam.": _SAM,
    "timm.models.visformer.": _CONVOLVED,
    "timm.models.volo.": "outlook attention weighs neighbours on a map, and tokens stay a map",
    "timm.models.xcit.": "its attention is between channels, and between patches it has convolutions over a map",
    "torchvision.models.maxvit.": _WINDOWS,
    "torchvision.models.resnet.": _MAPS,
    "torchvision.models.swin_transformer.": _WINDOWS,
    "transformers.models.convnext.": _MAPS,
    "transformers.models.cvt.": "its queries, keys and values are made by convolutions over a map",
    "transformers.models.dinat.": _NEIGHBOURS,
    "transformers.models.donut.": _WINDOWS,
    "transformers.models.focalnet.": "it has no attention: neighbours on a map modulate each other by convolutions",
    "transformers.models.glpn.": _STRIDED,
    "transformers.models.groupvit.": "it assigns its patches to fewer groups by itself, between stages",
    "transformers.models.hiera.": "its stages pool tokens by mask units of the grid, which lose their neighbours",
    "transformers.models.levit.": "its attention has a bias for every two places of the grid, and subsamples these",
    "transformers.models.mobilevit.": "its tokens are unfolded from a map and folded back for convolutions",
    "transformers.models.mobilevitv2.": "its tokens are unfolded from a map and folded back for convolutions",
    "transformers.models.poolformer.": "its tokens are a map, whose neighbours are pooled in place of attention",
    "transformers.models.pvt.": _STRIDED,
    "transformers.models.pvt_v2.": _STRIDED,
    "transformers.models.regnet.": _MAPS,
    "transformers.models.resnet.": _MAPS,
    "transformers.models.sam.": _SAM,
    "transformers.models.sam2.": _WINDOWS,
    "transformers.models.segformer.": _STRIDED,
    "transformers.models.swin.": _WINDOWS,
    "transformers.models.swin2sr.": _WINDOWS,
    "transformers.models.swinv2.": _WINDOWS,
    "transformers.models.timesformer.": (
        "every block regroups tokens by places for attention over time, and by frames for attention in space"
    ),
    "transformers.models.vitdet.": _SAM,
}


def why_refused(names: list[str]) -> str | None:
    """The reason of the first of some classes' full names that has one."""
    found = (reason for name in names for start, reason in REFUSED.items() if name.startswith(start))
    return next(found, None)
