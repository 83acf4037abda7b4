"""Language models that see: fewer image tokens in their prompts, and processors that count those that are left.

Within a patched tower (`tokenops.apply_patch`) tokens are reduced as it runs, and `fit_processor` has the processor
count them. Behind an unmodified one `compress` keeps the image tokens that its attention looks at, and shortens the
prompt.
"""

from .compressing import compress
from .processors import fit_processor
from .prompts import placeholder_counts, shorten

__all__ = ["compress", "fit_processor", "placeholder_counts", "shorten"]
