"""Several recipes and sweeps: one after the other here, in processes as memory and disk allow, or on a Ray cluster."""
