"""What an optimised model runs with: its graphs by form of call, and the denoisings at work."""
