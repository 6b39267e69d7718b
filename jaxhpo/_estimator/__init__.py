"""Second-door methods, one file each: frozen dataclasses with `pair(solver, outer_loss, num_steps, warm_start)`."""
