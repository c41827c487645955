"""Object storage: one contract, a local folder and S3 behind it."""
