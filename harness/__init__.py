"""Plan and train one run: experiment file -> frozen plan -> run; batches, engine, the loop, checkpoints, metrics."""
