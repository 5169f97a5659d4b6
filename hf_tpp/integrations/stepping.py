"""Schedules of the learning rate under accelerate, which steps them once for each process with batches of its own."""

from typing import Any

from accelerate.scheduler import AcceleratedScheduler

__all__ = ["ReplicaScheduler", "count_replicas"]


class ReplicaScheduler(AcceleratedScheduler):  # type: ignore[misc]
    """Steps once for each replica: the ranks of a replica share their batches."""

    num_steps: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step after the optimizer, as often as there were batches at the same time."""
        is_counted = self.step_with_optimizer and self.gradient_state.sync_gradients
        for index in range(self.num_steps if is_counted else 1):
            # OneCycleLR raises if it is stepped beyond its end, which the last steps of an epoch may do.
            total = getattr(self.scheduler, "total_steps", None)
            if index == 0 or total is None or self.scheduler.last_epoch < total - 1:
                super().step(*args, **kwargs)


def count_replicas(scheduler: AcceleratedScheduler, num_replicas: int) -> AcceleratedScheduler:
    """Have a prepared schedule count replicas instead of processes."""
    if not isinstance(scheduler, ReplicaScheduler):
        scheduler.__class__ = ReplicaScheduler
        scheduler.num_steps = 1 if scheduler.split_batches else num_replicas
        scheduler.split_batches = True  # for accelerate: one step at a time
    return scheduler
