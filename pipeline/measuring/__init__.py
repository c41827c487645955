"""What is measured of images and of a model: below training and evaluation, which may both use it."""
