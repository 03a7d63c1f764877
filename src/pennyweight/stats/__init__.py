"""What calibration accumulates about the input of a site; every statistic can be merged."""
