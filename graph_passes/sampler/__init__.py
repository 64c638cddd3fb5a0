"""The sampler's own update, and the cached sampler run along a recording."""
