"""What a plan chooses and what a search offers: plain data."""
