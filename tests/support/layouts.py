"""Where the elements of a tensor may lie in memory, with NaN where there is room between them."""

import torch
from torch.nn.functional import pad

NAN = float("nan")


def of_more(x):
    """Some rows of more."""
    dim = max(x.dim() - 2, 0)
    return torch.cat((x, torch.full_like(x, NAN)), dim=dim).narrow(dim, 0, x.shape[dim])


#: the same values
LAYOUTS = {
    "channels first": lambda x: x.transpose(max(x.dim() - 2, 0), -1).contiguous().transpose(max(x.dim() - 2, 0), -1),
    "images last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack((x, torch.full_like(x, NAN)), dim=-1).flatten(-2)[..., ::2],
    "shifted": lambda x: pad(x, (1, 2), value=NAN)[..., 1:-2],  # not aligned to more than an element, rows apart
    "some rows of more": of_more,
}
#: one of the values again and again, with strides of 0
EXPANDED = {
    "one image for all": lambda x: x[:1].expand(x.shape),
    "one value for all": lambda x: x.flatten()[:1].expand(x.shape),
}
