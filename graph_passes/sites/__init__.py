"""Where caches can go: branches, sites, calibration targets."""
