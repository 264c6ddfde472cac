"""The stages of one iteration: layers, sampling, active_backward, packing, exchange, update, probabilities."""
