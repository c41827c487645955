"""Networks that answer (x_t, t, label), their configurations, sizes and costs."""
