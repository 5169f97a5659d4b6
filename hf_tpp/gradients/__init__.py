"""From the gradients that a pipeline pass kept to `p.grad`: shared sums, release, data parallelism, norm."""
