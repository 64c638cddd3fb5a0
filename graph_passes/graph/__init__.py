"""The model as a graph: captured, classed, counted, checked."""
