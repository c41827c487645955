"""Algorithm 1 and what training minimises: noised batches, objectives, the choice of t, averages of weights."""
