"""save_patched and load_patched: a patched model in a folder, its method and options beside the weights."""

import dataclasses
import inspect
import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .apply import Patch, apply_patch, distributed, remove_patch
from .as_json import check_keys, decoded, encoded, read_json
from .engine import METHODS, Method
from .site import Site, Where, is_patched

FORMAT, VERSION = "tokenops-patch", 1
#: the method; what it added to the model; and the weights of a model that is not transformers'
METHOD_FILE, ADDED_FILE, WEIGHTS_FILE = "tokenops.json", "tokenops.safetensors", "model.safetensors"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Place(NamedTuple):
    """Where a method is: the path of the part that `apply_patch` was given, and what it was told beside."""

    path: str
    told: Where


def save_patched(model: Any, folder: str | PathLike[str]) -> None:
    """Save a patched model: weights, method and options, as they are now (``model.r`` that was set since, too).

    In the folder are:

    - ``tokenops.json``: ``{"format": "tokenops-patch", "version": 1, "method", "module", "options"}``, module being the
      path of the part that was patched, null for the whole model;
    - ``tokenops.safetensors``, where the method added something to the model (SiT's slimmings, the scorer of "dps"):
      its tensors, named by number of the block;
    - transformers' models as their ``save_pretrained`` writes them, so that ``type(model).from_pretrained(folder)``
      gives the plain model, as it always does; of others the plain model's state dict, ``model.safetensors``.

    Args:
        model: behind `tokenops.apply_patch`, or with one part that is.
        folder: made if it is not there. Files of these names are replaced.

    Raises:
        TypeError: an option is of a kind that JSON has not, or a value of the state dict is no tensor.
        ValueError: the model is not patched, or a part of one that is; it lost blocks since; it is wrapped (by
            torch.compile, DistributedDataParallel or FSDP), on the meta device, or has adapters; its method's class has
            no name; or the folder is a file. Nothing was written.

    >>> import tempfile, timm, tokenops, torch
    >>> def plain():
    ...     return timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3).eval()
    >>> model, images = tokenops.apply_patch(plain(), "sit", keeping_ratio=0.7), torch.randn(1, 3, 64, 64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokenops.save_patched(model, folder)
    ...     again = tokenops.load_patched(plain(), folder)
    >>> torch.equal(again(images), model(images))
    True
    """
    path, patched = _patched_part(model)
    patch: Patch = patched.tokenops_patch
    site = Site(patched)
    site.refuse_others()
    if len(site.blocks) != patch.depth:
        raise ValueError(
            f"save_patched: the model has {len(site.blocks)} blocks, but had {patch.depth} when it was patched:"
            " remove_patch, and apply_patch to what it is now"
        )
    text = _to_json(patch.method, Place(path, patch.where))
    added = _added(patched)
    own = {id(value) for value in added.state_dict(keep_vars=True).values()}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in own}
    transformers = _is_transformers(type(model))
    if own or not transformers:  # else save_pretrained takes what it needs, offloaded weights too
        _refuse_values(state)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_patched: {folder} is a file, but it must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METHOD_FILE, ADDED_FILE):  # no method stands beside another's weights if writing fails
        (folder / name).unlink(missing_ok=True)
    if not transformers:
        save_file(_apart(state), folder / WEIGHTS_FILE, {"format": "pt"})
    elif own:
        model.save_pretrained(folder, state_dict={name: value.detach() for name, value in state.items()})
    else:
        model.save_pretrained(folder)
    if own:
        save_file(_apart(added.state_dict()), folder / ADDED_FILE, {"format": "pt"})
    (folder / METHOD_FILE).write_text(text, encoding="utf-8")


def load_patched(model: Any, folder: str | PathLike[str], **kwargs: Any) -> Any:
    """The model that `save_patched` saved, with its method, options and weights; every tensor must fit (strict).

    Files are read as JSON and safetensors: nothing in them is executed.

    Args:
        model: a class of transformers (``transformers.ViTModel``, the saved model's own), whose ``from_pretrained``
            makes the model of the folder's config; or another model, not patched, made as the saved one was: its
            weights are loaded in place, in its dtype and on its device. timm keeps no record of the arguments a model
            was made with, so the folder alone does not make one.
        folder: a folder on this machine.
        **kwargs: of ``from_pretrained`` (``dtype``, ``device_map``), for a class alone.

    Returns:
        The patched model; a class's in evaluation mode, as ``from_pretrained`` gives it.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        TypeError: the model is neither, or is transformers' own, whose class is to be given.
        ValueError: a file holds something else, the method or an option is not known, the model is patched already, or
            weights are missing, left over or of another shape. The model is as before.
    """
    folder = Path(folder)
    method, place = _from_json(_present(folder, METHOD_FILE).read_text(encoding="utf-8"))
    if isinstance(model, type):
        return _patched(_from_pretrained(model, folder, kwargs), place, method, folder)
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_patched: model must be a torch.nn.Module or a class of transformers, but got {model!r}")
    if kwargs:
        raise TypeError(f"load_patched: {', '.join(kwargs)} given, but only a class's from_pretrained takes options")
    if _is_transformers(type(model)):
        name = type(model).__name__
        raise TypeError(f"load_patched: the model is transformers': give its class, load_patched({name}, folder)")
    if is_patched(model):
        raise ValueError(f"load_patched: the {type(model).__name__} is patched already: remove_patch comes first")
    weights = _tensors(folder, WEIGHTS_FILE)
    if any(value.is_meta for value in model.state_dict().values() if isinstance(value, Tensor)):
        raise ValueError("load_patched: the model is on the meta device: make it on another one (to_empty)")
    before = {name: v.detach().clone() for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    try:
        _load(model, weights, folder / WEIGHTS_FILE)
        return _patched(model, place, method, folder)
    except BaseException:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in before:
                    value.copy_(before[name])
        raise


def options_of(method: Method) -> dict[str, Any]:
    """The options of a method by name, those that were not given too, and its setting as it is now.

    Raises:
        TypeError: its constructor takes options without a name, or does not take its setting.

    >>> from tokenops.methods import EViT
    >>> options_of(EViT(0.5))
    {'keep_rate': 0.5, 'reduction_loc': None, 'fuse_token': True}
    """
    kind = type(method)
    found: dict[str, Any] = {}
    if "tokenops_given" in vars(method):
        args, kwargs = vars(method)["tokenops_given"]
        signature = inspect.signature(kind.__init__)
        bound = signature.bind(method, *args, **kwargs)
        bound.apply_defaults()
        for parameter in list(signature.parameters.values())[1:]:
            value = bound.arguments[parameter.name]
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            elif parameter.kind in _NAMED:
                found[parameter.name] = value
            elif value or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise TypeError(f"{kind.__name__}: {parameter.name}={value!r} has no name in its constructor's call")
    elif dataclasses.is_dataclass(method):  # whose constructor is made behind the class: nothing was noted
        found = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.init}
    if method.setting is not None:
        if method.setting not in found:
            raise TypeError(f"{kind.__name__}: its constructor does not take {method.setting!r}, its setting")
        found[method.setting] = method.value
    return found


def _to_json(method: Method, place: Place) -> str:
    """The text that `_from_json` reads."""
    kind = type(method)
    if METHODS.get(getattr(kind, "name", None)) is not kind:  # type: ignore[arg-type]
        raise ValueError(f"save_patched: {kind.__name__} is not known by a name of its own: give the class a `name`")
    where = {"tower": place.told.module, "prefix": place.told.prefix}
    head = {"format": FORMAT, "version": VERSION, "method": kind.name, "module": place.path or None, **where}
    rows = []
    for name, value in options_of(method).items():
        if name in kind.documents and isinstance(value, kind.documents[name]):
            found = {"document": json.loads(value.to_json())}
        else:
            found = encoded(f"save_patched: {kind.name}'s option {name}", value)
        rows.append(f"    {json.dumps(name)}: {json.dumps(found)}")
    options = "{\n" + ",\n".join(rows) + "\n}" if rows else "{}"
    return f'{json.dumps(head)[:-1]}, "options": {options}}}\n'


def _from_json(text: str) -> tuple[Method, Place]:
    """The method that JSON text tells, and what it is for."""
    found = read_json(text, METHOD_FILE, FORMAT, VERSION)
    check_keys(METHOD_FILE, found, {"format", "version", "method", "module", "tower", "prefix", "options"})
    name, path, options = found["method"], found["module"], found["options"]
    told = Where(found["tower"], found["prefix"])
    if not isinstance(name, str) or name not in METHODS:
        known = ", ".join(map(repr, METHODS))
        raise ValueError(f"{METHOD_FILE}: method {name!r} is none of {known}: one of your own must be imported first")
    if not all(part is None or isinstance(part, str) for part in (path, told.module)) or not isinstance(options, dict):
        raise ValueError(f"{METHOD_FILE}: module and tower must be text or null, options an object, but got {found}")
    if not (told.prefix is None or type(told.prefix) is int):
        raise ValueError(f"{METHOD_FILE}: prefix must be a whole number or null, but got {told.prefix!r}")
    kind, given = METHODS[name], {}
    for option, value in options.items():
        what = f"{METHOD_FILE}: {name}'s option {option}"
        if isinstance(value, dict) and set(value) == {"document"}:
            if option not in kind.documents:
                raise ValueError(f"{what} is a document, but {name} takes no object for it")
            given[option] = kind.documents[option].from_json(json.dumps(value["document"]))
        else:
            given[option] = decoded(what, value)
    takes = inspect.signature(kind.__init__)
    try:
        takes.bind(None, **given)
    except TypeError as error:
        raise ValueError(f"{METHOD_FILE}: {name} takes other options than {', '.join(given)}: {error}") from None
    try:
        return kind(**given), Place(path or "", told)
    except TypeError as error:
        raise ValueError(f"{METHOD_FILE}: {error}") from error


def _patched_part(model: Any) -> tuple[str, Any]:
    """The part of a model that `apply_patch` was given, and its path; ValueError where it cannot be saved."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"save_patched: model must be a patched torch.nn.Module, but got {model!r}")
    if (wrapper := distributed(model)) is not None:
        raise ValueError(f"save_patched: {wrapper} shares the model's weights among processes: save the model within")
    modules = dict(model.named_modules())
    if any("_orig_mod" in path.split(".") for path in modules):
        raise ValueError(
            "save_patched: torch.compile wraps the model or a part of it: save what is within, `_orig_mod`"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("save_patched: the model has adapters, which save_pretrained would save alone: merge them")
    around = vars(model).get("tokenops_within")
    if around is not None:
        raise ValueError(f"save_patched: the {type(model).__name__} is patched as a part: save the {around} around it")
    found = [p for p, m in modules.items() if "tokenops_patch" in vars(m) and "tokenops_within" not in vars(m)]
    if not found:
        raise ValueError(f"save_patched: this {type(model).__name__} is not patched: apply_patch comes first")
    if len(found) > 1:
        raise ValueError(
            f"save_patched: {', '.join(found)} are patched, but one part can be saved: save each by itself"
        )
    return found[0], modules[found[0]]


def _added(patched: Any) -> nn.ModuleDict:
    """What the method added to the blocks of a patched model, by block and name."""
    blocks = Site(patched).blocks
    added = patched.tokenops_patch.added
    return nn.ModuleDict({str(i): nn.ModuleDict({name: getattr(blocks[i], name)}) for i, name in added.items()})


def _refuse_values(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save_patched: {name} of the state dict is a {type(value).__name__}, but must be a tensor")
        if value.is_meta:
            raise ValueError(f"save_patched: {name} is on the meta device, or offloaded: bring the weights here first")


def _apart(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that share no memory, which safetensors does not take: tied weights are written twice, and load alike."""
    found, seen = {}, set[int]()
    for name, value in state.items():
        value = value.detach()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return found


def _is_transformers(kind: type) -> bool:
    names = (f"{base.__module__}.{base.__name__}" for base in kind.__mro__)
    return "transformers.modeling_utils.PreTrainedModel" in names


def _from_pretrained(kind: Any, folder: Path, kwargs: dict[str, Any]) -> Any:
    """The plain model of a folder of save_pretrained, if all weights are there and no others."""
    if not hasattr(kind, "from_pretrained"):
        raise TypeError(f"load_patched: {kind.__name__} has no from_pretrained: give a model that was made already")
    _present(folder, "config.json")
    try:
        model, told = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"load_patched: {folder} has not all that from_pretrained needs: {error}") from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"load_patched: the weights in {folder} do not fit {kind.__name__}: {error}") from error
    wrong = {name: sorted(map(str, keys)) for name, keys in told.items() if keys}
    if wrong:
        raise ValueError(f"load_patched: the weights in {folder} do not fit {kind.__name__}: {wrong}")
    return model


def _patched(model: Any, place: Place, method: Method, folder: Path) -> Any:
    """A model with a method in the part of this place, and what was added as saved; unpatched where that fails."""
    try:
        part = model.get_submodule(place.path)
    except AttributeError:
        raise ValueError(f"{METHOD_FILE}: module {place.path!r} is no part of the {type(model).__name__}") from None
    apply_patch(part, method, module=place.told.module, prefix=place.told.prefix)
    try:
        added = _added(part)
        if added.state_dict():
            _load(added, _tensors(folder, ADDED_FILE), folder / ADDED_FILE)
    except BaseException:
        remove_patch(part)
        raise
    return model


def _load(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"load_patched: the weights in {file} do not fit: {error}") from None


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"load_patched: there is no {name} in {folder}")
    return folder / name


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(_present(folder, name))
    except SafetensorError as error:
        raise ValueError(f"load_patched: {folder / name} is no file of safetensors: {error}") from None
