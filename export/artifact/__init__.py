"""What an artifact folder holds: the manifest, the graphs, the names of inputs and outputs."""
