"""The forward and the reverse process: schedules, predictions, the denoiser that samplers see, guidance."""
