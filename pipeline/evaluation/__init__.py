"""Evaluation: figures of a model beside real images and a naive model."""
