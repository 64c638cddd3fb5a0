"""Statistics of increments, and the low-rank factors made from them."""
