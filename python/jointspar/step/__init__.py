"""The stages of one training iteration, in order: layers, sampling, active_backward, packing, exchange, update, probabilities."""
