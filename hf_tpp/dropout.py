r"""Random streams for dropout under tensor parallelism.

On replicated activations every tp rank must drop the same elements; inside a region the ranks hold different heads and
must drop independently. The stream inside a region is *derived* from the generator's state at the entry:

    replicated   ---- draw d ----------------------------- continue --->     the same on all tp ranks
                          \ seed(d, tp_rank)            /
    region                  -------- attention ---------                     different on each

so whatever restores the generator (activation checkpointing does, before it recomputes) restores both streams. What
is replicated inside a region, too (the input of an addition of low rank), drops from the shared stream.

A model without dropout may still draw (noise of its own, blocks skipped at random). Its passes start from one seed on
all tp ranks, which costs nothing inside them, so that they draw alike even if their generators had parted.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

__all__ = ["DropoutStreams", "derive_seed"]


def derive_seed(*parts: int) -> int:
    """A seed for every tuple of numbers; the same in every process, since integers hash without a salt."""
    return hash(parts) & 0x7FFF_FFFF_FFFF_FFFF


@dataclass(slots=True)
class DropoutStreams:
    """The default generator of one device, switched between the stream that tp ranks share and their own.

    Attributes:
        device: Whose default generator the model's dropout draws from.
        tp_rank: Position on the tp axis.
        tp_size: Its length.
        sources: Modules and configurations whose numbers say how much is dropped.
        active: Some dropout is on in this step; if not, the caller's generators are left alone.
    """

    device: torch.device
    tp_rank: int
    tp_size: int = 1
    sources: list[tuple[object, str]] = field(default_factory=list, repr=False)
    active: bool = False
    _shared_state: torch.Tensor | None = field(default=None, repr=False)
    _own_state: torch.Tensor | None = field(default=None, repr=False)
    _num_seeds: int = field(default=0, repr=False)

    @classmethod
    def of_model(cls, model: nn.Module, device: torch.device, tp_rank: int, tp_size: int) -> "DropoutStreams":
        """The streams of `model`, with everything in it that is called a rate of dropout or a router's jitter."""
        streams = cls(device, tp_rank, tp_size)
        streams.find_sources(model)
        return streams

    def find_sources(self, model: nn.Module) -> None:
        """Look for dropout rates in `model` again: it was given further modules."""
        self.sources = []
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                self.sources.append((module, "p"))
            self.sources += [
                (module, name)
                for name, value in vars(module).items()
                if ("drop" in name or "jitter" in name) and type(value) in (int, float)
            ]

    def draws(self) -> bool:
        """True if any dropout rate is above zero now."""
        return any(getattr(owner, name) > 0.0 for owner, name in self.sources)

    def next_seed(self, active: bool) -> int:
        """For the next pass, of which the first rank's counts; 0 where nothing has to be seeded.

        Args:
            active: Some dropout is on; without any, the caller's generator does not move.
        """
        if active:
            return int(torch.randint(0, 2**62, ()).item())
        if self.tp_size == 1:
            return 0
        self._num_seeds += 1
        return derive_seed(zlib.crc32(torch.get_rng_state().numpy().tobytes()), self._num_seeds)

    @contextmanager
    def running(self, active: bool, seed: int, *place: int) -> Iterator[None]:
        """Use the streams within this context, and leave the caller's generators as they were.

        Args:
            active: Some dropout is on.
            seed: Where it is not, what tp ranks draw from nevertheless; the same on them. 0: the caller's generators.
            *place: Replica and stage, which draw other numbers.
        """
        if not active and not seed:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.active = active
            try:
                if not active:
                    self._seed_everything(derive_seed(seed, *place))
                yield
            finally:
                self.active = False
                self._shared_state = self._own_state = None

    def start_microbatch(self, *seed: int) -> None:
        """Begin a microbatch: `seed` must be the same on the tp ranks, and different for everything else."""
        if self.active:
            self._seed_everything(derive_seed(*seed))

    def enter_region(self) -> None:
        """From replicated activations into this rank's heads or neurons."""
        if self.active:
            seed = derive_seed(self._draw(), self.tp_rank)
            self._shared_state = self._state()
            self._seed(seed)

    def leave_region(self) -> None:
        """Back on replicated activations: the shared stream goes on."""
        if self._shared_state is not None:
            self._set_state(self._shared_state)
            self._shared_state = None

    def enter_replicated(self) -> None:
        """Inside a region: what follows works on replicated activations, and draws from the shared stream."""
        if self._shared_state is not None:
            self._own_state = self._state()
            self._set_state(self._shared_state)

    def leave_replicated(self) -> None:
        """Inside a region: this rank's heads or neurons again."""
        if self._own_state is not None:
            self._shared_state = self._state()
            self._set_state(self._own_state)
            self._own_state = None

    def enter_sequence_shards(self) -> None:
        """From here to the end of the microbatch the tp ranks hold different tokens."""
        if self.active:
            self._seed(derive_seed(self._draw(), self.tp_rank))

    def _draw(self) -> int:
        """A number that depends on nothing but the generator's state, which it advances."""
        if self.device.type == "cuda":
            # Reading the offset instead of drawing keeps the host from waiting for the GPU.
            generator = torch.cuda.default_generators[self.device.index or 0]
            offset = generator.get_offset()
            generator.set_offset(offset + 4)
            return derive_seed(generator.initial_seed(), offset)
        return int(torch.randint(0, 2**62, ()).item())

    def _state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_state(self, state: torch.Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def _seed_everything(self, seed: int) -> None:
        """The CPU's generator too: models decide with it which blocks to skip."""
        self._seed(seed)
        if self.device.type != "cpu":
            torch.default_generator.manual_seed(seed)

    def _seed(self, seed: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
