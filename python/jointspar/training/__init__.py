"""The training application behind `jointspar train`: config, data, models, loop, records, plots."""
