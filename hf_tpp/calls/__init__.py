"""One call of a parallel model: check the batch, let the ranks agree, run the schedule, give everyone the result."""
