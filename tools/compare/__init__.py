"""An artifact beside the full model along recorded runs."""
