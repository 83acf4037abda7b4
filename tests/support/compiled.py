"""Which tests of compiled code a machine cannot run: only one without a compiler, or without AMX. A library that is
missing for another reason fails them."""

import pytest
import torch

from tokenops.ops import native

_reason = native.why_not("cpu")
#: why there is no compiled code here, where there cannot be; else None
ABSENT = _reason if _reason is not None and "no C++ compiler" in _reason else None
needs_compiled = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
needs_amx = pytest.mark.skipif(
    ABSENT is not None or _reason is None and native.attention_isa(torch.bfloat16) != "amx", reason="no AMX here"
)
