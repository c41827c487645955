"""Bits per dimension: the variational bound term by term, its decoder, the probability flow."""
