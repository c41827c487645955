"""Entry points: parse, validate, call the pipeline, exit code."""
