"""MLflow runs and the connection to their server."""
