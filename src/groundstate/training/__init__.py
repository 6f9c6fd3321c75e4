"""Training small networks with an energy: data, models, the loop, checkpoints, and the record of a run."""
