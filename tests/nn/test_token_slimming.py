"""TokenSlimming and ReverseTokenSlimming against the published modules (published/sit.py), and what they promise."""

import pytest
import torch

import tokenops
from published import sit as published_sit
from support.tolerance import assert_as_good_as_plain
from support.weights import spread
from tokenops.nn import ReverseTokenSlimming, TokenSlimming

B, N, M, C = 2, 37, 18, 64


def pair(ours, published):
    """The two modules with the same weights, and the published one in fp64 as the truth."""
    spread(published)
    ours.load_state_dict(published.state_dict(), strict=True)
    truth = type(published)(*SIZES[type(published)]).double()
    truth.load_state_dict(published.state_dict())
    return ours, published, truth


SIZES = {published_sit.Slimming: (C, M), published_sit.Reverse: (C, M, N)}


def slimming():
    return pair(TokenSlimming(C, M), published_sit.Slimming(C, M))


def reverse():
    return pair(ReverseTokenSlimming(C, M, N), published_sit.Reverse(C, M, N))


def run(module, x, dtype):
    """Result and gradients of every parameter and of x, for the same loss everywhere."""
    module, x = module.to(dtype), x.to(dtype).requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    grads = torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])
    return {"y": y, "x": grads[0], **dict(zip(dict(module.named_parameters()), grads[1:], strict=True))}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [slimming, reverse])
def test_equals_the_published_module(make, dtype, ran_kernels, chosen):
    ours, published, truth = make()
    x = torch.randn(B, N if make is slimming else M, C)
    if dtype != torch.float32:
        for module in (ours, published):
            module.to(dtype)
        truth.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
        x = x.to(dtype)
    with ran_kernels() as names:
        got = run(ours, x, dtype)
    expected, right = run(published, x, dtype), run(truth, x, torch.float64)
    op = "soft_aggregate" if make is slimming else "token_mlp"
    assert names == chosen(f"{op}_fwd", f"{op}_bwd")
    for name, value in got.items():
        if name == "weight.3.bias":  # a constant along the tokens: the softmax cancels it, what is left is rounding
            assert right[name].abs().max() < 1e-10
            assert value.abs().max() <= torch.finfo(dtype).eps * right["weight.3.weight"].abs().max() * 10
        else:
            cancels = terms_of_the_scale(truth, x.double()) if name == "scale" else 0.0
            assert_as_good_as_plain(value, expected[name], right[name], name, cancels)


def terms_of_the_scale(module, x):
    """The gradient of a scale is one number, a sum of many that cancel: twice the norm of these."""
    found = []
    hook = module.weight.register_forward_hook(lambda layers, given, logits: found.append(logits))
    y = module(x)
    hook.remove()
    weight = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).reshape(y.shape)
    (dlogits,) = torch.autograd.grad((y * weight).sum(), found)
    return 2 * (found[0] * dlogits / module.scale).norm().item()


@pytest.mark.usefixtures("on_device")
def test_prefix_tokens_are_carried():
    ours, published, _ = slimming()
    x = torch.randn(B, 2 + N, C)
    y = ours(x, prefix=2)
    assert torch.equal(y[:, :2], x[:, :2])
    torch.testing.assert_close(y[:, 2:], published(x[:, 2:]), rtol=1e-5, atol=1e-6)


def test_the_order_of_the_tokens_does_not_matter_and_any_number_is_taken():
    ours, _, _ = slimming()
    for tokens in (1, 5, 50):
        x = torch.randn(B, tokens, C)
        torch.testing.assert_close(ours(x[:, torch.randperm(tokens)]), ours(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_device")
def test_aggregation_is_what_slims():
    ours, _, _ = slimming()
    x = torch.randn(B, 1 + N, C)
    a = ours.aggregation(x, prefix=1)
    assert a.shape == (B, N, M)
    torch.testing.assert_close(a.sum(1), torch.ones(B, M))
    torch.testing.assert_close(a.transpose(1, 2) @ x[:, 1:], ours(x, prefix=1)[:, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("make", [slimming, reverse])
def test_autocast_computes_in_bf16(make, device):
    ours, published, _ = make()
    x = torch.randn(B, N if make is slimming else M, C)
    exact = ours(x)
    with torch.autocast(device, torch.bfloat16):
        y, plain = ours(x), published(x)
    assert y.dtype == (torch.float32 if make is slimming else torch.bfloat16)
    error, allowed = (y - exact).norm(), (plain - exact).norm()
    assert 0 < error <= 2 * allowed


def test_reference_backend_is_the_same_computation():
    for ours, _, _ in (slimming(), reverse()):
        x = torch.randn(B, M, C)
        y = ours(x)
        with tokenops.use_backend("reference"):
            torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5)


def test_initialisation_is_the_published_one():
    for module in (TokenSlimming(384, 98), ReverseTokenSlimming(384, 98, 196)):
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                assert part.weight.std().item() == pytest.approx(0.02, rel=0.05) and not part.bias.any()
    slim = TokenSlimming(64, 4)
    x = torch.randn(2, 9, 64)
    assert slim.scale.shape == (1, 1, 1) and slim.scale.item() == 1
    torch.testing.assert_close(slim(x), x.mean(1, keepdim=True).expand(2, 4, 64), rtol=0, atol=0.05)


def test_errors():
    with pytest.raises(ValueError, match="slim_tokens=0"):
        TokenSlimming(8, 0)
    with pytest.raises(ValueError, match="ratio=0.1 of dim=8 leaves no hidden channel"):
        TokenSlimming(8, 4, ratio=0.1)
    with pytest.raises(ValueError, match="slim_tokens=4 and tokens=0"):
        ReverseTokenSlimming(8, 4, 0)
    with pytest.raises(ValueError, match="w1 has 4 columns, but z .its tokens. has 5"):
        ReverseTokenSlimming(8, 4, 9)(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="prefix=7"):
        TokenSlimming(8, 4)(torch.randn(1, 5, 8), prefix=7)
