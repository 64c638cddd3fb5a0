"""What a sampler feeds to a model, and how the inputs behave."""
