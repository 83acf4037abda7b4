"""What a reduced model keeps of the dense one's answers, on images without labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import unwrapped
from .views import evaluating, logits_of

DIGITS = 10  # of a similarity: those that differ by rounding alone are ties
CHUNK = 2**22  # similarities that are ranked at once
#: what classifiers are called outside of timm, whose models tell it; the last two are so only if they are linear
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "heads", "head", "fc")


class Fidelity(NamedTuple):
    """How alike two models answer, by `fidelity`; None is what their outputs have not.

    Attributes:
        images: how many they were shown.
        top1: the part of the images that both give the same class.
        cosine: the mean cosine of their embeddings.
        neighbours: the mean rank correlation of an image's similarities to all others.
        difference: the mean absolute difference of dense outputs.
        relative: that, divided by the mean absolute value of the unreduced model's.
    """

    images: int
    top1: float | None
    cosine: float | None
    neighbours: float | None
    difference: float | None
    relative: float | None


def fidelity(dense: nn.Module, reduced: nn.Module, batches: Iterable[Any], classifier: str | None = None) -> Fidelity:
    r"""How alike a model and its reduced form answer on the same images, which need no labels.

    With logits :math:`z_i` and embeddings :math:`e_i` of the dense model on image i of n, and :math:`z'_i, e'_i` of the
    reduced one:

    .. math:: \mathrm{top1} = \frac1n \sum_i [\arg\max z_i = \arg\max z'_i], \qquad
        \mathrm{cosine} = \frac1n \sum_i \cos(e_i, e'_i)

    .. math:: \mathrm{neighbours} = \frac1n \sum_i \mathrm{corr}(
        \mathrm{rank}_{j \ne i} \cos(e_i, e_j), \mathrm{rank}_{j \ne i} \cos(e'_i, e'_j))

    .. math:: \mathrm{difference} = \mathrm{mean}\, |y - y'|, \qquad
        \mathrm{relative} = \mathrm{mean}\, |y - y'| \,/\, \mathrm{mean}\, |y|

    Neighbours are Spearman's correlation: ties have the mean of their ranks, similarities are rounded to 10 digits
    before, and images whose similarities are all tied in one of the models are left out. It needs 3 images.
    Differences are of dense outputs y, ``(B, N, C)`` or ``(B, C, H, W)``, over all images and elements; such models
    have no top1.

    The output is what the model returns, of several tensors the logits, else the first. The embedding is what goes into
    the classifier, timm's ``forward_head(..., pre_logits=True)``: of two classifiers (distilled models) the mean of
    both inputs, of tokens or maps the mean over all places. Without a classifier, it is transformers' ``pooler_output``
    where there is one, else the output, again the mean over places; and there is no top1. The classifier is timm's
    ``get_classifier()``, or ``classifier`` and ``heads``, or a linear ``head`` or ``fc``, of the outermost module that
    has one.

    Both run in evaluation mode without gradients, and every module has its own mode again afterwards. Outputs are
    compared in fp64, batch by batch; kept are embeddings alone. ``torch.autocast`` around the call is followed; outside
    of it, floating images are cast to each model's dtype. Of what ``torch.compile(model)`` or ``model.compile()``
    made, the module itself runs, not compiled.

    Args:
        dense: the model to compare with.
        reduced: the other one: patched, compacted, distilled. It may be on another device.
        batches: of images ``(B, ...)``, tensors, or tuples and lists that begin with one, moved to the models' devices;
            None is passed over.
        classifier: the classifier by its name in both models, where it has another one than those above.

    Raises:
        TypeError: a model is no module; batches is one tensor or a dict, or one of them is no tensor of images.
        ValueError: there is no image, no module of that name, or the models have another number of classes; both are
            the same model; a batch has no dimension of images, or the output not one row for each; outputs or
            embeddings are not finite; logits come from one of the models alone; a classifier was not called, or is
            in a part that `torch.compile` has wrapped.

    >>> import copy, timm, tokenops, torch
    >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3).eval()
    >>> reduced = tokenops.apply_patch(copy.deepcopy(dense), "tome", r=0)
    >>> found = tokenops.fidelity(dense, reduced, [torch.randn(4, 3, 64, 64)])
    >>> found.images, found.top1, round(found.cosine, 4), round(found.neighbours, 4), found.difference
    (4, 1.0, 1.0, 1.0, None)
    """
    return fidelities(dense, {"reduced": reduced}, batches, classifier)["reduced"]


@torch.no_grad()
def fidelities(
    dense: nn.Module, reduced: Mapping[str, nn.Module], batches: Iterable[Any], classifier: str | None = None
) -> dict[str, Fidelity]:
    """`fidelity` of several reduced models, by their names, of one run of the dense one and one over the batches."""
    if "dense" in reduced:
        raise ValueError("fidelity: no reduced model can have the name 'dense'")
    models = {"dense": dense, **reduced}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"fidelity: {name} is {described(model)}, but it must be a torch.nn.Module")
    for name, model in reduced.items():
        if unwrapped(model) is unwrapped(dense):
            raise ValueError(
                f"fidelity: dense and {name} are the same model: apply_patch works in place, so copy.deepcopy first"
            )
    sums = {name: Sums(name) for name in reduced}
    broken: dict[str, Any] = dict.fromkeys(models, 0)  # images of which something is not finite
    embeddings: list[Tensor] = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(uncompiled(model)))
        asks = {name: stack.enter_context(asked(model, classifier, name)) for name, model in models.items()}
        for where, images in images_of(batches):
            answers = {name: answer_of(ask, images, name, where) for name, ask in asks.items()}
            embeddings.append(answers["dense"].embedding)
            for name, answer in answers.items():
                broken[name] = answer.broken() + broken[name]
            for name in reduced:
                sums[name].add(answers["dense"], answers[name])
    total = sum(map(len, embeddings))
    if not total:
        raise ValueError("fidelity: batches has no image")
    if found := [f"{name} for {int(count)} of {total} images" for name, count in broken.items() if count]:
        raise ValueError(f"fidelity: outputs or embeddings are not finite of {', of '.join(found)}")
    whole = torch.cat(embeddings)
    return {name: each.fidelity(whole) for name, each in sums.items()}


def images_of(batches: Any) -> Iterator[tuple[str, Tensor]]:
    """The name and images of every batch that has some; TypeError and ValueError as `fidelity` says."""
    allowed = "images (B, ...), a tensor, or a tuple or list that begins with one"
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"fidelity: batches is {described(batches)}, but it must be an iterable, each of it {allowed}")
    for i, batch in enumerate(batches):
        if batch is None:  # no image of it could be read
            continue
        name, images = f"batches[{i}]", batch
        if isinstance(batch, (tuple, list)):
            if not batch:
                raise ValueError(f"fidelity: {name} is an empty {type(batch).__name__}, but it must be {allowed}")
            name, images = f"{name}[0]", batch[0]
        if not isinstance(images, Tensor):
            raise TypeError(f"fidelity: {name} is {described(images)}, but it must be {allowed}")
        if images.dim() == 0:
            raise ValueError(f"fidelity: {name} is {described(images)}, but it must be {allowed}")
        yield name, images


def described(value: Any) -> str:
    """What an error calls a value.

    >>> described(torch.zeros(3, 8, 8)), described({})
    ('a tensor of shape (3, 8, 8)', 'a dict')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def answer_of(ask: Callable[[Tensor], "Answer"], images: Tensor, name: str, where: str) -> "Answer":
    """What the model of a name says of a batch of a name; one image without its batch is a ValueError."""
    try:
        answer = ask(images)
    except Exception as error:
        if images.dim() != 3 or isinstance(error, torch.OutOfMemoryError) or str(error).startswith("fidelity: "):
            raise
        raise ValueError(
            f"fidelity: {where} is {described(images)}, which {name} does not take ({error}): it must be images"
            " (B, ...); of one image (C, H, W) it is image[None]"
        ) from error
    if answer.output.dim() < 2 or len(answer.output) != len(images) or len(answer.embedding) != len(images):
        raise ValueError(
            f"fidelity: of {where}, {described(images)}, {name} gives {described(answer.output)} and embeddings of"
            f" shape {tuple(answer.embedding.shape)}, but images, outputs and embeddings must be (B, ...) of the same B"
        )
    return answer


class Answer(NamedTuple):
    """What a model says of a batch: its output, whether it is logits, and the embeddings ``(B, C)``."""

    output: Tensor
    logits: bool
    embedding: Tensor

    def broken(self) -> Tensor:
        """Of how many images something is not finite; logits of -inf are classes that are ruled out."""
        said = self.output.isfinite() | (self.output == -torch.inf) if self.logits else self.output.isfinite()
        return (~(said.flatten(1).all(dim=1) & self.embedding.isfinite().all(dim=1))).sum()


class Sums:
    """What is summed over batches of a reduced model's answers; sums are in fp64, where the models are."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the reduced model
        self.same: Any = None  # images of the same class
        self.apart: Any = None  # of dense outputs: the sum of differences, that of the dense model's values
        self.elements = 0
        self.embeddings: list[Tensor] = []

    def add(self, mine: Answer, other: Answer) -> None:
        y, z = mine.output, other.output.to(mine.output.device)
        self.embeddings.append(other.embedding)
        if mine.logits != other.logits:
            has, lacks = ("dense", self.name) if mine.logits else (self.name, "dense")
            raise ValueError(
                f"fidelity: {has} has logits, but {lacks} has none: both must have a classifier, or neither (classifier"
                " names one that has another name than usual)"
            )
        if mine.logits:
            if y.shape[1] != z.shape[1]:
                raise ValueError(f"fidelity: dense has {y.shape[1]} classes, but {self.name} {z.shape[1]}")
            same = (y.argmax(dim=1) == z.argmax(dim=1)).sum()
            self.same = same if self.same is None else self.same + same
        elif y.dim() > 2 and y.shape == z.shape:
            apart = torch.stack(((y.double() - z.double()).abs().sum(), y.double().abs().sum()))
            self.apart = apart if self.apart is None else self.apart + apart
            self.elements += y.numel()

    def fidelity(self, dense: Tensor) -> Fidelity:
        """Of all batches, with the dense model's embeddings."""
        images = len(dense)
        found: dict[str, float | None] = dict.fromkeys(("top1", "cosine", "difference", "relative"))
        reduced = torch.cat(self.embeddings).to(dense.device)
        if dense.shape == reduced.shape:
            found["cosine"] = F.cosine_similarity(dense.double(), reduced.double()).mean().item()
        if self.same is not None:
            found["top1"] = self.same.item() / images
        if self.apart is not None:
            apart, size = self.apart.tolist()
            found["difference"] = apart / self.elements
            found["relative"] = apart / size if size else None
        return Fidelity(images, neighbours=neighbours(dense, reduced), **found)


@contextmanager
def asked(model: nn.Module, classifier: str | None, name: str = "model") -> Iterator[Any]:
    """What gives a model's `Answer` to images, within; errors call it by the name."""
    model = uncompiled(model)
    heads = classifiers_of(model, classifier)
    for path, part in model.named_modules():
        if is_compiled(part, outermost=part is model) and any(module in heads for module in part.modules()):
            raise ValueError(
                f"fidelity: {name} has its classifier in what torch.compile made of {path or 'its forward'!r}, which"
                " hides what goes into it: give the model as it was before torch.compile"
            )
    inputs: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if isinstance(given, Tensor):
            inputs[module] = given

    def ask(images: Tensor) -> Answer:
        inputs.clear()
        if place is not None:
            images = images.to(place.device)
            if images.is_floating_point() and dtype is not None and not torch.is_autocast_enabled(place.device.type):
                images = images.to(dtype)
        raw = model(images) if model._compiled_call_impl is None else model._call_impl(images)  # type: ignore[operator]
        output = logits_of(raw)
        pooler = getattr(raw, "pooler_output", None)
        found = [pooled(inputs[head]) for head in heads if head in inputs]
        named = classifier is not None or output.dim() == 2
        if not found and named and (missed := [head for head in heads if not isinstance(head, nn.Identity)]):
            path = next((path for path, module in model.named_modules() if module is missed[0]), "")
            raise ValueError(
                f"fidelity: {name} did not call its classifier {path!r} (classifier={classifier!r}): classifier must"
                " name the module that makes the logits"
            )
        if found:
            embedding = torch.stack(found).mean(dim=0)
        else:
            embedding = pooled(output if pooler is None else pooler)
        classified = any(head in inputs and not isinstance(head, nn.Identity) for head in heads)
        return Answer(output, classified and output.dim() == 2, embedding)

    place = next(model.parameters(), None)
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    handles = [head.register_forward_pre_hook(before, with_kwargs=True) for head in heads]
    try:
        yield ask
    finally:
        for handle in handles:
            handle.remove()


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped: what is compiled already passes over hooks that come later."""
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module, outermost: bool) -> bool:
    """Whether calls of a module, or of its forward alone, go to what `torch.compile` made of them. The outermost one
    is called past its ``compile()``.
    """
    forward = vars(module).get("forward")
    if hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable"):
        return True
    return "_orig_mod" in module._modules or (module._compiled_call_impl is not None and not outermost)


def pooled(x: Tensor) -> Tensor:
    """``(B, C)`` as it is, of tokens ``(B, N, C)`` or maps ``(B, C, H, W)`` the mean over the places; in fp32 at least.

    >>> pooled(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])), pooled(torch.tensor([[[[1.0, 3.0]], [[2.0, 6.0]]]]))
    (tensor([[2., 4.]]), tensor([[2., 4.]]))
    """
    x = x if x.dtype == torch.float64 else x.float()
    return x.mean(dim=1) if x.dim() == 3 else x.flatten(2).mean(dim=2) if x.dim() > 3 else x.clone()


def classifiers_of(model: nn.Module, name: str | None = None) -> list[nn.Module]:
    """What makes the logits, as `fidelity` says; none is no error. ValueError where there is no module of the name."""
    if name is not None:
        try:
            return [model.get_submodule(name)]
        except AttributeError:
            raise ValueError(
                f"fidelity: classifier={name!r}, but the {type(model).__name__} has no such module"
            ) from None
    for module in model.modules():
        own: Any = getattr(module, "get_classifier", None)
        if own is not None:
            heads = own()
            found = list(heads) if isinstance(heads, (tuple, list)) else [heads]
        else:
            found = [getattr(module, each, None) for each in CLASSIFIERS[:-2]]
            found += [part for each in CLASSIFIERS[-2:] if isinstance(part := getattr(module, each, None), nn.Linear)]
        if heads := [head for head in found if isinstance(head, nn.Module)]:
            return heads
    return []


def neighbours(dense: Tensor, reduced: Tensor) -> float | None:
    """The mean rank correlation of `fidelity`; None of fewer than 3 images, or where no image has neighbours to rank.

    >>> line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.5], [0.0, 1.0]])
    >>> neighbours(line, line), round(neighbours(line, line[[0, 2, 1, 3]]), 2)
    (1.0, 0.5)
    """
    n = len(dense)
    if n < 3:
        return None
    unit = [F.normalize(x.double(), dim=1) for x in (dense, reduced)]
    total, ranked = 0.0, 0
    for rows in torch.arange(n, device=dense.device).split(max(CHUNK // n, 1)):
        others = torch.arange(n, device=dense.device) != rows.unsqueeze(1)
        mine, theirs = ((x[rows] @ x.T).round(decimals=DIGITS)[others].view(-1, n - 1) for x in unit)
        found = correlation(ranks(mine), ranks(theirs))
        there = ~found.isnan()
        total, ranked = total + found[there].sum().item(), ranked + int(there.sum())
    return total / ranked if ranked else None


def ranks(x: Tensor) -> Tensor:
    """The ranks from 1 in each row, ties the mean of theirs.

    >>> ranks(torch.tensor([[0.5, 0.1, 0.5, 0.9, 0.5]]))
    tensor([[3., 1., 3., 5., 3.]], dtype=torch.float64)
    """
    ordered = x.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, x.contiguous(), right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's of each row; NaN where one is constant."""
    x, y = (each - each.mean(dim=1, keepdim=True) for each in (x, y))
    return (x * y).sum(dim=1) / ((x * x).sum(dim=1) * (y * y).sum(dim=1)).sqrt()
