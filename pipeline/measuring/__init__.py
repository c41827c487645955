"""What is measured of images and of a model: below training, which validates, and evaluation."""
