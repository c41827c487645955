"""Editing of given images, one method per file: partial diffusion, inpainting, interpolation.

What is random is a function of the seed and the sample ids, so that an edited image does not depend on its neighbours
in the batch.
"""
