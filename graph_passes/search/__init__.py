"""Finding the best plan under a budget or an error."""
