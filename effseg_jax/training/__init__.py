"""State, step, optimizer, sharding, checkpoints and the log: everything a task is trained with."""
