"""Orchestration: Ray, object storage and MLflow around `ddpm`. `jobs/` shows how its parts are called."""
