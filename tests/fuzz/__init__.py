"""Random calls of every public operator, compared with what the docstrings and the papers' formulas say."""
