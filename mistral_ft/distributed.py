"""Several processes, one to a GPU, that work as one: who is who, what they tell each other, and what if one fails.

They are started by torchrun or accelerate, which name them in the environment. torch is imported where it is used: the
steps that need none ask for a rank too.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

# How long the others may be waited for, where no --ddp_timeout says so: torch's and transformers' own default.
TIMEOUT_SECONDS = 1800
# Seconds between two looks at how the others are, and those that a process has to clean up before it is ended.
LOOK_SECONDS, GRACE_SECONDS = 1.0, 10.0
STORE_SECONDS = 30.0  # that an answer of the launcher's store may take


def rank() -> int:
    """Number of this process, from 0. The first one makes folders, writes files and talks."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def take_sharding() -> bool:
    """Whether accelerate's configuration asks for FSDP; it is told no more of it, for the base is sharded here."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"


def silence_others() -> None:
    """Only the first process has a stdout."""
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open


def join(seconds: float, on_gpu: bool, backend: str | None = None) -> None:
    """Meet the other processes, and take this one's GPU.

    Args:
        seconds: how long the others may be waited for. torch itself gives up later than `Watch`, which can say why.
        backend: torch's name of what carries the data; None: nccl between GPUs, else gloo.
    """
    import torch
    import torch.distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=timedelta(seconds=1.5 * seconds))
        _start_watch(seconds)


def gather(value: Value) -> list[Value]:
    """The value of every process, by rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    _arrive()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` returns in the first process, the only one that calls it."""
    return gather([] if rank() else [make()])[0][0]


def total(number: int, device: "torch.device") -> "torch.Tensor":
    """The sum of every process's number: an int64 tensor of shape ()."""
    import torch
    import torch.distributed as dist

    summed = torch.tensor(number, device=device)
    if world_size() > 1:
        _arrive()
        dist.all_reduce(summed)
    return summed


def vote(flags: Sequence[bool], device: "torch.device") -> list[bool]:
    """For each flag whether any process has set it."""
    if world_size() == 1:
        return list(flags)
    import torch
    import torch.distributed as dist

    _arrive()
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()


def sum_gradients(parameters: "Sequence[torch.nn.Parameter]", learned: Sequence[bool]) -> None:
    """Give all processes the sum of their gradients.

    torch's DistributedDataParallel would hide the same transfer behind the backward pass, but wraps the model, copies
    the frozen base at the start, and knows no parameters that only some ranks' batches reach. An adapter's gradients
    are small: 0.4 GB for rank 16 on the 24B, once per optimizer step.

    Args:
        parameters: those that learn; the same in every process.
        learned: which of them have a gradient in any process. The others keep None, and the optimizer leaves them be.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    chosen = [parameter for parameter, any_has in zip(parameters, learned, strict=True) if any_has]
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen]  # one transfer for all
    )
    dist.all_reduce(flat)
    for parameter, total in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = total.view_as(parameter)


def finish() -> None:
    """Wait for the others and part."""
    if world_size() > 1:
        import torch.distributed as dist

        gather(None)
        dist.destroy_process_group()


def _connect() -> "torch.distributed.PrefixStore":
    """The launcher's key-value store, which outlives every process."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
    return PrefixStore(f"mistral_ft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def first_to_fail(text: str) -> bool:
    """Tell the others that this process ends with an error; whether none did so before, so that it is said once."""
    if world_size() == 1:
        return True
    mine = f"{rank()} {text}"
    try:
        return _connect().compare_set("failed", "", mine) == mine.encode()
    except Exception:  # no store to be had: better twice than not at all
        return True


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return world_size() > 1 and any(
        words in str(error) for words in ("onnection closed by peer", "onnection reset by peer", "NCCL", "Broken pipe")
    )


_watch: "Watch | None" = None


def _start_watch(seconds: float) -> None:
    global _watch
    # The watch asks the main thread to end by it, also out of a collective operation of gloo.
    signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(1))
    _watch = Watch(seconds)
    _watch.start()
    atexit.register(_watch.end)


def _arrive() -> None:
    if _watch is not None:
        _watch.arrive()


class Watch(threading.Thread):
    """Ends this process when another one has failed, and names those that keep the others waiting.

    A process that waits for another in a collective operation sees neither for itself.

    Args:
        seconds: how long the others may be waited for.
    """

    def __init__(self, seconds: float):
        super().__init__(daemon=True)
        self.seconds = seconds
        self.store = _connect()
        self.meetings = 0
        self.over = threading.Event()

    def end(self) -> None:
        """Watch no more; a thread that still talks to the store when Python shuts down would abort the process."""
        self.over.set()
        self.join(STORE_SECONDS)

    def arrive(self) -> None:
        """Say that this process has come to where it waits for the others."""
        self.meetings += 1
        self.store.set(f"meetings/{rank()}", str(self.meetings))

    def run(self) -> None:
        store = _connect()  # one of its own: a store's operations wait for each other
        found, since = [0], time.monotonic()
        while not self.over.wait(LOOK_SECONDS):
            try:
                if store.check(["failed"]):
                    if int(store.get("failed").split()[0]) == rank():
                        return
                    return self._end_process()
                counts = [self._count(store, number) for number in range(world_size())]
            except Exception:  # the launcher is gone
                return self._end_process()
            if counts != found:
                found, since = counts, time.monotonic()
            elif min(counts) < max(counts) and time.monotonic() - since > self.seconds:
                return self._report([number for number, count in enumerate(counts) if count < max(counts)])

    @staticmethod
    def _count(store: "torch.distributed.PrefixStore", number: int) -> int:
        key = f"meetings/{number}"
        return int(store.get(key)) if store.check([key]) else 0

    def _report(self, late: list[int]) -> None:
        text = (
            f"process {', '.join(map(str, late))} of {world_size()} (numbered from 0) has kept the others waiting for "
            f"{self.seconds:g} s; look at its machine and its GPU, or raise --ddp_timeout"
        )
        if first_to_fail(text):
            print(f"error: {text}", file=sys.stderr, flush=True)
        self._end_process()

    def _end_process(self) -> None:
        main = threading.main_thread().ident
        assert main is not None  # it was started
        signal.pthread_kill(main, signal.SIGUSR2)
        if not self.over.wait(GRACE_SECONDS):
            os._exit(1)
