"""Graphs, plans and models as plain data and HTML, to be looked at."""
