"""From the plain graph to one variant for every step mode."""
