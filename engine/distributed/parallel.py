"""The collectives that a model's forward pass uses on one rank. `rendezvous.connect` makes them."""

from __future__ import annotations

import torch
from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.groups import StageLink, TensorParallelGroup
from engine.grid import Grid


class Parallel:
    """One rank's tensor parallel group and its links to the previous and the next stage.

    Owns: the groups. Does not own: the order of calls, which every rank takes from the step plans.
    torch's global default group is not used, so a process may run several engines.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store | None = None,
        tensor_parallel: TensorParallelGroup | None = None,
        previous_stage: StageLink | None = None,
        next_stage: StageLink | None = None,
        *,
        copies_through_host: bool = False,
        ranks_on_device: int = 1,
    ) -> None:
        """Take what `rendezvous.connect` has opened.

        Args:
            grid: the layout, and this rank's place in it.
            store: where the ranks agree on numbers; None for a replica of one rank.
            tensor_parallel: None where TP is 1.
            previous_stage: None on the first stage.
            next_stage: None on the last stage.
            copies_through_host: activations are on a GPU, but the groups move CPU memory.
            ranks_on_device: how many ranks run on this rank's device, itself included.
        """
        self.grid = grid
        self.ranks_on_device = ranks_on_device
        self._store = store
        self._tensor_parallel = tensor_parallel
        self._previous_stage, self._next_stage = previous_stage, next_stage
        self._copies_through_host = copies_through_host
        self._agreements = 0  # numbers the keys in the store

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture the collectives: they need no help from the host."""
        return not self._copies_through_host

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the stage's tensor parallel ranks. May overwrite `x`.

        On CPUs, parts are added in rank order. A ring would add each element in an order that depends on the
        element's place in the tensor, and then a row's bits would depend on the rows beside it.
        """
        if self._tensor_parallel is None:
            return x
        return self._to_device(self._tensor_parallel.all_reduce(self._to_group(x)), x.device)

    def gather_vocab(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """All-gather the ranks' slices of the vocabulary."""
        if self._tensor_parallel is None:
            return logits_SV
        gathered = self._tensor_parallel.gather_columns(self._to_group(logits_SV))
        return self._to_device(gathered, logits_SV.device)

    def min_over_ranks(self, value: int) -> int:
        """The minimum of a number over all ranks of the replica. Slow: only for the start."""
        if self._store is None:
            return value
        self._agreements += 1
        key = f"min/{self._agreements}"
        self._store.set(f"{key}/{self.grid.rank}", str(value))
        return min(int(self._store.get(f"{key}/{rank}")) for rank in range(self.grid.world))

    def send_hidden(self, x_TD: torch.Tensor) -> None:
        """Send activations to the next stage. May return before they have arrived."""
        assert self._next_stage is not None
        self._next_stage.send(self._to_group(x_TD))

    def recv_hidden(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Receive activations from the previous stage. Both stages know the shape from the plan."""
        assert self._previous_stage is not None
        return self._to_device(self._previous_stage.receive(shape, dtype), device)

    def leave(self) -> None:
        """Tell the other ranks that this rank ends: they notice the end of a process tens of ms later."""
        for group in (self._tensor_parallel, self._previous_stage, self._next_stage):
            if group is not None:
                group.leave()

    def _to_group(self, x: torch.Tensor) -> torch.Tensor:
        return (x.cpu() if self._copies_through_host else x).contiguous()

    def _to_device(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device) if self._copies_through_host else x
