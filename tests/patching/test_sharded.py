"""Sharded training in real processes under gloo: wrapped before or after the patch, by block or by class."""

import functools
import multiprocessing
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from support.patched_models import METHODS, applied, images, model_of, patched
from tokenops import apply_patch, remove_patch

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["timm", "tokenops.methods", "torch.distributed.fsdp"])


def run(function, folder, rank, world, port):
    """In the new process; what goes wrong is told in a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        function()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


def together(function, folder, world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [
        processes.Process(target=run, args=(function, folder, i, world, port), daemon=True) for i in range(world)
    ]
    for process in started:
        process.start()
    try:
        for rank, process in enumerate(started):
            process.join(120)
            error = folder / f"error{rank}.txt"
            assert process.exitcode == 0, error.read_text() if error.is_file() else f"exit code {process.exitcode}"
    finally:
        for process in started:
            process.kill()


def sharded(model, **kwargs):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_training(model, twin):
    """Logits and gradients: of half the images each where there are two processes."""
    x = images(4)
    mine = x.chunk(dist.get_world_size())[dist.get_rank()]
    expected = twin(x)
    y = model(mine)
    torch.testing.assert_close(y, expected.chunk(dist.get_world_size())[dist.get_rank()], rtol=1e-4, atol=1e-5)
    expected.square().mean().backward()
    y.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter.grad), wanted[name], rtol=1e-3, atol=1e-5)
    assert len(wanted) == len(list(model.named_parameters()))


def by_block():
    """fully_shard, before the patch and after it."""
    for method in METHODS:
        for before in (False, True):
            dense, twin = model_of("plain").train(), patched(method).train()
            if before and method == "sit":
                with pytest.raises(ValueError, match="sit adds parameters, which fully_shard would not know of"):
                    applied(sharded(dense), method)
                continue
            model = applied(sharded(dense), method) if before else sharded(applied(dense, method))
            assert [type(block).__name__ for block in model.blocks] == ["FSDPBlock"] * 3
            same_training(model, twin)
            if method == "tome":
                model.r = twin.r = [1, 0, 2]
                torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-5)
            kinds = [type(module) for module in model.modules()]
            if before:
                expected = model_of("plain")(images())
                torch.testing.assert_close(remove_patch(model)(images()), expected, rtol=1e-4, atol=1e-5)
            else:
                with pytest.raises(ValueError, match="FSDPBlock was wrapped after the patch .* take that off first"):
                    remove_patch(model)
                assert [type(module) for module in model.modules()] == kinds
    root = fully_shard(patched("tome"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    kinds = [type(module) for module in root.modules()]
    with pytest.raises(ValueError, match="FSDPVisionTransformer was wrapped after the patch"):
        remove_patch(root)
    assert [type(module) for module in root.modules()] == kinds  # nothing is half undone


def by_class():
    """FullyShardedDataParallel, whose policy finds blocks by their class."""
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    wrap = functools.partial(
        FullyShardedDataParallel, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    for method in METHODS:
        for before in (False, True):
            inner, twin = model_of("plain").train(), patched(method).train()
            if not before:
                applied(inner, method)
            model = wrap(inner)
            if before and method == "sit":
                with pytest.raises(ValueError, match="which FullyShardedDataParallel would not know of"):
                    applied(inner, method)
                continue
            if before:
                applied(inner, method)
            assert [type(block).__name__ for block in inner.blocks] == ["FullyShardedDataParallel"] * 3
            x = images(4)
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
            model(x).square().mean().backward()
            if method == "tome":
                inner.r = twin.r = [1, 0, 2]
                torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
            remove_patch(inner)
            torch.testing.assert_close(model(x), model_of("plain")(x), rtol=1e-4, atol=1e-5)


def cast_logarithms(block, given, flow):
    """As mixed precision does; they are made of the sizes again then, by a logarithm whose last bit may be another."""
    return flow._replace(state=flow.state._replace(log_sizes=flow.state.log_sizes.bfloat16()))


def in_mixed_precision():
    """Floats are cast between blocks; sizes are whole numbers, also above the 256 that bfloat16 counts to."""
    x = torch.randn(1, 3, 160, 160)
    for before in (False, True):
        seen = []
        model = model_of("plain", img_size=160, patch_size=4, depth=8)
        twin = apply_patch(model_of("plain", img_size=160, patch_size=4, depth=8), "tome", r=10000).bfloat16()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if before:
            apply_patch(sharded(model, mp_policy=policy), "tome", r=10000)
        else:
            sharded(apply_patch(model, "tome", r=10000), mp_policy=policy)
        for block in model.blocks:
            block.register_forward_hook(lambda m, args, y: seen.append(y))
        for block in twin.blocks[:-1]:
            block.register_forward_hook(cast_logarithms)
        with torch.no_grad():
            y, expected = model(x), twin(x.bfloat16())
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        for flow in seen[:-1]:
            assert flow.tokens.dtype == torch.bfloat16
            assert flow.state.sizes.dtype == torch.int32 and flow.state.sizes.sum(dim=1).tolist() == [1601]
        assert seen[-2].state.sizes.max() > 256


@pytest.mark.parametrize("world", [1, 2])
def test_shards_of_every_block(tmp_path, world):
    together(by_block, tmp_path, world)


@pytest.mark.filterwarnings("ignore")
def test_shards_by_class(tmp_path):
    together(by_class, tmp_path, 1)


def test_sizes_survive_mixed_precision(tmp_path):
    together(in_mixed_precision, tmp_path, 1)
