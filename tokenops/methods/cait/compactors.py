"""Compactors, the other way to prune while training (ResRep's), and the change of basis that comes before pruning."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ...nn import Attention
from .blocks import blocks_of
from .costs import KINDS, ChannelCosts
from .pruning import BudgetPruner


class CompactorLinear(nn.Module):
    r"""The packed projection of an attention behind square matrices that learn which of its channels can go.

    .. math:: W'_q = C_q W_q, \quad b'_q = C_q b_q \qquad \text{for every head, and so for k and v}

    The matrices begin as identities and are multiplied onto the weights, so that tokens cost what they did.

    Args:
        attention: the attention whose ``qkv`` this is to replace; its parameters are shared under the same names.

    Attributes:
        compactor_qk: ``(2, H, Dk, Dk)``, of q and of k.
        compactor_v: ``(H, Dv, Dv)``.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        qkv: Any = attention.qkv
        H, wide, deep = attention.num_heads, attention.head_dim, attention.v_head_dim
        self.in_features, self.out_features = qkv.in_features, qkv.out_features
        self.weight, self.bias = qkv.weight, qkv.bias
        like = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
        self.compactor_qk = nn.Parameter(torch.eye(wide, **like).repeat(2, H, 1, 1))
        self.compactor_v = nn.Parameter(torch.eye(deep, **like).repeat(H, 1, 1))

    def _compacted(self, value: Tensor) -> Tensor:
        """C times the weight, or the bias: rows of all heads in and out."""
        matrices = [matrix.to(value.dtype) for matrix in (self.compactor_qk.flatten(0, 1), self.compactor_v)]
        parts = value.reshape(len(value), -1).split([matrix.shape[0] * matrix.shape[1] for matrix in matrices])
        products = [matrix @ part.unflatten(0, (len(matrix), -1)) for matrix, part in zip(matrices, parts)]
        return torch.cat([product.flatten(0, 1) for product in products]).reshape(value.shape)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._compacted(self.bias)
        return F.linear(x, self._compacted(self.weight), bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The plain layer with the same results; its parameters are this one's, overwritten."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        self.weight.copy_(self._compacted(self.weight.double()))
        if self.bias is not None:
            self.bias.copy_(self._compacted(self.bias.double()))
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


class CompactorPruner(BudgetPruner):
    r"""Prunes channels by compactors while a model trains, as ResRep does: the alternative to :class:`ChannelPruner`.

    The q, k and v of every head get a :class:`CompactorLinear`, the MLP's hidden channels a learned gate (a diagonal
    compactor: a whole one would triple the MLP's cost). Rows of a compactor that are to go lose the gradient of the
    task, and all rows are drawn to zero:

    .. math:: g \leftarrow m\, g + \lambda\, c / \|group\|

    where a group is what goes together: the rows j of C_q and C_k of a head (with ``same_channels`` of all heads), the
    row j of C_v, one gate. Every so many steps m is chosen anew by :func:`choose_channels`, from the rows' mean squares
    without costs, as they start alike: what was to go returns if others shrink faster. :meth:`freeze` folds the
    matrices into plain layers with masks of 0 and 1; then :func:`compact`.

    Under ``torch.distributed`` the model belongs in DistributedDataParallel after the pruner was made, so that the
    compactors are equal on all processes.

    Args:
        model: behind :func:`prunable`, tokens merged already, without masks.
        target, costs, every, multiples, same_channels, kinds: as in :class:`ChannelPruner`.
        steps: the first and the last step of the schedule.
        settle: steps behind the last one before the compactors are folded, in which masked rows still go to zero.
        strength: lambda. ResRep's for SGD with a learning rate of 0.01.

    Raises:
        TypeError: the model is not prunable.
        ValueError: as in :class:`ChannelPruner`.

    Source: Ding et al., ResRep (ICCV 2021), whose authors CAIT shares; its use in attention, with the same count in
    every head, is reconstructed.
    """

    per_cost = False

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        steps: tuple[int, int],
        settle: int = 0,
        strength: float = 1e-4,
        costs: str | ChannelCosts = "macs",
        every: int = 200,
        multiples: Mapping[str, int] | None = None,
        same_channels: bool = False,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if settle < 0 or strength < 0:
            raise ValueError(f"settle={settle} and strength={strength} must be at least 0")
        shared: Any = dict(steps=steps, costs=costs, every=every, multiples=multiples)
        super().__init__(model, target, same_channels=same_channels, kinds=kinds, **shared)
        self.settle, self.strength = settle, strength
        for layer in self.layers:
            if layer.kind == "hidden":
                weight = layer.owner.fc1.weight
                layer.mask = nn.Parameter(torch.ones(layer.width, device=weight.device, dtype=weight.dtype))
            elif not isinstance(layer.owner.qkv, CompactorLinear):
                layer.owner.qkv = CompactorLinear(layer.owner)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Compactors and gates, which do not decay."""
        for layer in self.layers if not self.frozen else ():
            yield layer.mask if layer.kind == "hidden" else getattr(layer.owner.qkv, f"compactor_{layer.kind}")

    def optimizers(self) -> list[Optimizer]:
        """ResRep's SGD for them."""
        return [] if self.frozen else [SGD(list(self.parameters()), 0.01, momentum=0.99)]

    @property
    def left(self) -> int:
        return 0 if self.frozen else super().left + self.settle

    def _rows(self, tensor, kind):
        """A compactor (or its gradient) as rows (1 or 2, H, D, numbers of a row): q's and k's go together."""
        if kind == "hidden":
            return tensor.view(1, 1, -1, 1)
        return tensor if kind == "qk" else tensor.unsqueeze(0)

    def _squares(self):
        """Mean square of the rows of every channel, ``(H, D)``, for every layer."""
        rows = [self._rows(p.detach(), layer.kind) for p, layer in zip(self.parameters(), self.layers)]
        return [row.float().square().sum(3).mean(0) for row in rows]

    @torch.no_grad()
    def step(self) -> bool:
        """Change the compactors' gradients, behind ``loss.backward()`` and before the optimizer's step.

        Returns:
            Whether it was chosen anew what is to go.
        """
        if self.frozen:
            return False
        chosen = self._advance(self._squares)
        for layer, kept, parameter in zip(self.layers, self.kept, self.parameters()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            row = self._rows(parameter, layer.kind)
            norm = row.float().square().sum((0, 1, 3) if self.same_channels else (0, 3)).sqrt().clamp_min(1e-12)
            gradient = self._rows(parameter.grad, layer.kind)
            gradient.mul_(kept.to(gradient.device).unsqueeze(2)).add_(row / norm.unsqueeze(-1), alpha=self.strength)
        if self.left <= 0:
            self.freeze()
        return chosen

    @property
    def remaining(self) -> float:
        """The largest norm of a channel's row that is to go (of q's and k's the root mean square): what
        :meth:`freeze` cuts off. ResRep waits for 1e-5.
        """
        squares = zip(self._squares(), self.kept)
        return max((float(s[~kept.to(s.device)].amax()) for s, kept in squares if not kept.all()), default=0.0) ** 0.5

    @torch.no_grad()
    def freeze(self) -> None:
        """Fold the compactors into plain layers and mask what is to go; they are no parameters any more."""
        if self.frozen:
            return
        for layer, kept in zip(self.layers, self.kept):
            owner = layer.owner
            if layer.kind == "hidden":
                layer.mask = nn.Parameter(layer.mask * kept[0].to(layer.mask.device), requires_grad=False)
                continue
            if isinstance(owner.qkv, CompactorLinear):
                owner.qkv = owner.qkv.fold()
            layer.mask = kept.to(owner.qkv.weight.device, owner.qkv.weight.dtype)
        self.frozen = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner was, before the model's state is loaded: a frozen one has other parameters."""
        super().load_state_dict({**state, "frozen": False})
        if state["frozen"]:
            self.freeze()


def fold_compactors(model: nn.Module) -> nn.Module:
    """Fold every compactor of a model into its plain layer, in place, without pruning anything. Returns the model."""
    for block in blocks_of(model):
        if isinstance(block.attn.qkv, CompactorLinear):
            block.attn.qkv = block.attn.qkv.fold()
    return model


@torch.no_grad()
def rotate_heads(attention: Attention) -> Attention:
    r"""Change the basis of every head, in place and exactly, so that its first channels say the most.

    .. math:: W_q^{hT} W_k^h = U S V^T, \qquad W_q^h \leftarrow \sqrt{S}\, U^T, \quad W_k^h \leftarrow \sqrt{S}\, V^T

    and the same for :math:`W_o^h W_v^h`, biases included. Of all ways to keep d channels of a head, the first d are
    then the best for tokens of uncorrelated channels (Eckart and Young); before, a head's basis is arbitrary. The key
    bias, constant along every softmax row, becomes 0, and the value bias goes into the output bias if there is one.

    Args:
        attention: without masks, norms of q and k, norm of the result or gate.

    Returns:
        The attention.

    Raises:
        ValueError: there is something between the projections that a change of basis would change.

    Source: ours; CAIT (Wang et al., arXiv 2309.15755) publishes none.
    """
    for name in ("qk_mask", "v_mask", "q_norm", "k_norm", "norm", "gate"):
        part = getattr(attention, name)
        if part is not None and not isinstance(part, nn.Identity):
            raise ValueError(f"rotate_heads: the attention has {name}, which another basis would change")
    H, sizes = attention.num_heads, (attention.head_dim, attention.head_dim, attention.v_head_dim)
    qkv: Any = attention.qkv
    proj: Any = attention.proj
    if qkv.bias is not None:
        drop_biases(attention)
    packed = qkv.weight.double()
    if qkv.bias is not None:
        packed = torch.cat((packed, qkv.bias.double().unsqueeze(1)), dim=1)
    q, k, v = (part.unflatten(0, (H, -1)) for part in packed.split([H * size for size in sizes]))
    out = proj.weight.double().unflatten(1, (H, -1)).movedim(1, 0)  # (H, D, Dv)
    q, k = _balanced(q.mT, k)
    out, v = _balanced(out, v)
    packed = torch.cat([part.flatten(0, 1) for part in (q.mT, k, v)])
    qkv.weight.copy_(packed[:, : qkv.in_features])
    if qkv.bias is not None:
        qkv.bias.copy_(packed[:, -1])
    proj.weight.copy_(out.movedim(0, 1).flatten(1))
    return attention


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same products ``(H, n, d) @ (H, d, m)``, the channels d by their share of it, largest first."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
    root = s.sqrt()
    return q_left @ (u * root.unsqueeze(1)), (root.unsqueeze(2) * vh) @ q_right.mT


@torch.no_grad()
def drop_biases(attention: Attention) -> None:
    r"""Zero the key bias and fold the value bias into the output bias, in place and exactly, where they allow it.

    :math:`q \cdot b_k` is constant along a softmax row, whose probabilities sum to 1; so :math:`b_o + W_o b_v` replaces
    b_v. A norm of k keeps the one, a norm of the result, a gate or a projection without bias the other.
    """
    qkv: Any = attention.qkv
    proj: Any = attention.proj
    if qkv.bias is None:
        return
    wide = attention.num_heads * attention.head_dim
    if isinstance(attention.k_norm, nn.Identity):
        qkv.bias[wide : 2 * wide].zero_()
    if isinstance(attention.norm, nn.Identity) and attention.gate is None and proj.bias is not None:
        values = qkv.bias[2 * wide :]
        masked = values.double() if attention.v_mask is None else values.double() * attention.v_mask.flatten()
        proj.bias.copy_(proj.bias + proj.weight.double() @ masked)
        values.zero_()
