"""One line for a pipeline: what is slower here, what is kept, what is put in place."""
