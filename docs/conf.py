"""How Sphinx builds these pages: `make docs`."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import tokenops

project = "tokenops"
author = "the tokenops authors"
version = release = tokenops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "py:obj"  # `name` in a docstring is a name of Python

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
python_maximum_signature_line_length = 100
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are a list in the class's description, not entries of their own

html_theme = "furo"
html_title = "tokenops"
html_math_renderer = "mathml"  # browsers draw it by themselves: nothing is fetched


def skipped(app, what, name, member, skip, options):
    """Fields of named tuples, of which the class's docstring says more than "Alias for field number 0"."""
    return True if type(member).__name__ == "_tuplegetter" else None


def inline(self, node) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block(self, node) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("autodoc-skip-member", skipped)
