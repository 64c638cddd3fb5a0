"""`calicache evaluate`: many images of the full model and under a plan, and how good they are."""
