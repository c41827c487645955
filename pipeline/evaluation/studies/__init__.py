"""Studies: samplers, bounds and averages compared; calibration."""
