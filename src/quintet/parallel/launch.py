"""Join the processes that a launcher such as torchrun started, and leave them at the end."""

import atexit
import fcntl
import json
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from quintet.errors import DisagreementError, DistributedError, InputError, shown
from quintet.parallel import faults
from quintet.parallel.verdict import Process
from quintet.parallel.world import Degrees, World

# Seconds that processes wait for each other.
TIMEOUT = 300.0
VARIABLE = "QUINTET_DISTRIBUTED_TIMEOUT"
# The request that asks Linux for the address of a network interface.
SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Launch:
    """The launcher's environment variables.

    Attributes:
        rank: which of all processes it is.
        size: how many there are.
        local_rank: which of those of its machine it is.
        local_size: how many of them are on its machine.
        node: what tells its machine from others.
        address: where rank 0, or torchrun for it, is met.
        port: there.
        agent_keeps_store: whether torchrun keeps the meeting point, and not rank 0.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str
    address: str
    port: int
    agent_keeps_store: bool


def launched() -> Launch | None:
    """Read a launcher's variables; None without a launcher, or if it started one process.

    Raises:
        DistributedError: something of that is missing, or makes no sense.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise DistributedError(f"WORLD_SIZE={size} in the environment has to be 1 or more")
    if size == 1:
        return None
    rank = _number("RANK")
    if not 0 <= rank < size:
        raise DistributedError(
            f"RANK={rank} in the environment has to be 0 to {size - 1}, as WORLD_SIZE={size}; on "
            "several machines --nnodes is the same on all of them, and --node-rank another on each"
        )
    local_size = _number("LOCAL_WORLD_SIZE", size)
    local_rank = _number("LOCAL_RANK", rank % local_size)
    if not 0 <= local_rank < local_size:
        raise DistributedError(
            f"LOCAL_RANK={local_rank} in the environment has to be 0 to {local_size - 1}, as "
            f"LOCAL_WORLD_SIZE={local_size}"
        )
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise _missing("MASTER_ADDR")
    return Launch(
        rank,
        size,
        local_rank,
        local_size,
        os.environ.get("GROUP_RANK") or socket.gethostname(),
        address,
        _number("MASTER_PORT"),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def timeout_of(seconds: float | None) -> float:
    """Return the timeout in seconds of processes for each other: given, or of the environment.

    Raises:
        InputError: it is no positive number.
    """
    if seconds is None:
        text = os.environ.get(VARIABLE, "")
        try:
            seconds = float(text) if text else TIMEOUT
        except ValueError:
            raise InputError(f"{VARIABLE}={text!r} is no number of seconds") from None
    if not 0 < seconds <= 1e6:
        raise InputError(f"timeout={seconds:g} s has to be more than 0, and at most a million")
    return seconds


def own_device(kind: str | None = None) -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the CPU.

    Args:
        kind: "cpu" or "cuda"; what there is if not given.

    Raises:
        InputError: there are fewer GPUs than processes on this machine, or none.
    """
    count = torch.cuda.device_count()
    if kind == "cpu" or (kind is None and count == 0):
        return torch.device("cpu")
    launch = launched()
    index = 0 if launch is None else launch.local_rank
    if index >= count:
        raise InputError(
            f"local rank {index} has no GPU of its own: {count} can be seen (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}); start as many processes on a "
            "machine as it has GPUs, by torchrun --nproc-per-node"
        )
    return torch.device("cuda", index)


def connect(timeout: float | None = None, device: torch.device | None = None) -> float:
    """Make the group of all processes, unless the script made one, and return its timeout.

    From then on an error of one process is told to all.

    Raises:
        DistributedError: not all came in time, or there is no network between them.
        DisagreementError: they were started as different numbers of processes.
        InputError: the timeout is no number of seconds.
    """
    seconds = timeout_of(timeout)
    if faults.watch() is not None and dist.is_initialized():
        return seconds
    launch = launched()
    if not dist.is_initialized():
        if launch is None:
            raise DistributedError("no launcher started this process; start it by torchrun")
        try:
            _meet(launch, seconds, device or own_device())
        except DistributedError:
            if launch.rank == 0 and not launch.agent_keeps_store:
                # The others have to see it, too, and where they meet ends with this process.
                time.sleep(1)
            raise
    rank, size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore("quintet", _get_default_store())
    node = socket.gethostname() if launch is None else launch.node
    who = _introduced(store, rank, size)
    keeps = rank == 0 and not (launch is not None and launch.agent_keeps_store)
    watch = faults.Watch(store, rank, who, seconds, node, keeps)
    faults.begin(watch)
    atexit.register(watch.leave)
    return seconds


def join(
    degrees: Degrees | None = None,
    *,
    device: torch.device | None = None,
    timeout: float | None = None,
) -> World:
    """Return this process's place among those that a launcher started.

    Args:
        degrees: among how many what is divided; tp among all if not given.
        device: where it computes; the GPU of its local rank, or the CPU, if not given.
        timeout: seconds that processes wait for each other; QUINTET_DISTRIBUTED_TIMEOUT, or five
            minutes, if not given.

    Raises:
        DistributedError: no launcher started it, not all came in time, or no network is between
            them.
        InputError: the degrees are another number of processes.
    """
    device = device or own_device()
    seconds = connect(timeout, device)
    _use_cores(device)
    degrees = degrees or Degrees(tp=dist.get_world_size())
    return World.of(degrees, device, timeout=timedelta(seconds=seconds))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if not text:
        if default is None:
            raise _missing(name)
        return default
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name}={shown(text)} in the environment is no number") from None


def _missing(name: str) -> DistributedError:
    return DistributedError(
        f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment says that there are several "
        f"processes, and {name} is not set; start them by torchrun, which sets all there is to "
        "set, or unset WORLD_SIZE"
    )


def _meet(launch: Launch, seconds: float, device: torch.device) -> None:
    """Call the roll, and make the group of all."""
    wait = timedelta(seconds=seconds)
    where = f"{launch.address}:{launch.port} (MASTER_ADDR and MASTER_PORT)"
    try:
        store = TCPStore(
            launch.address,
            launch.port,
            is_master=launch.rank == 0 and not launch.agent_keeps_store,
            timeout=wait,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise DistributedError(
            f"rank {launch.rank} found nobody at {where} within {seconds:g} s: is rank 0 started, "
            "is that its machine, and may others reach the port?"
        ) from error
    _call_roll(PrefixStore("quintet", store), launch, seconds)
    _take_interface(launch.address)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=wait
        )
    except RuntimeError as error:
        raise _no_network(launch, error) from error


def _call_roll(store: Store, launch: Launch, seconds: float) -> None:
    """Wait until all processes are there, and agree on their number."""
    own = json.dumps({"size": launch.size, "rank": launch.rank})
    first = json.loads(store.compare_set("first", "", own))
    if first["size"] != launch.size:
        store.set(
            "refused",
            f"rank {launch.rank} was started as one of {launch.size} processes (WORLD_SIZE), and "
            f"rank {first['rank']} as one of {first['size']}; give all machines the same --nnodes "
            "and --nproc-per-node",
        )
    elif store.add(f"came/{launch.rank}", 1) > 1:
        store.set(
            "refused",
            f"two processes were started as rank {launch.rank}; on several machines --node-rank "
            "is another on each",
        )
    else:
        store.add("count", 1)
    try:
        refused = _waited(store, launch, seconds)
    except RuntimeError as error:
        raise DistributedError(
            f"what was met at {launch.address}:{launch.port} is gone, before all had come"
        ) from error
    if refused is not None:
        raise refused


def _waited(store: Store, launch: Launch, seconds: float) -> DistributedError | None:
    """Wait until all are counted, and return why they are not."""
    until = time.monotonic() + seconds
    while store.add("count", 0) < launch.size:
        if store.check(["refused"]):
            return DisagreementError(store.get("refused").decode())
        if store.check(["late"]) or time.monotonic() > until:
            store.set("late", "1")
            away = [str(r) for r in range(launch.size) if not store.check([f"came/{r}"])]
            return DistributedError(
                f"rank{'s' * (len(away) > 1)} {', '.join(away[:16])} of {launch.size} did not come "
                f"within {seconds:g} s to {launch.address}:{launch.port}: are all machines "
                "started, with that address, and may they reach it?"
            )
        time.sleep(0.05)
    return None


def _introduced(store: Store, rank: int, size: int) -> dict[int, Process]:
    """Announce this process to the others, and return all of them."""
    store.set(f"who/{rank}", json.dumps(asdict(Process(socket.gethostname(), os.getpid()))))
    return {r: Process(**json.loads(store.get(f"who/{r}"))) for r in range(size)}


def _interfaces() -> dict[str, str]:
    """Return the network interfaces of this machine that have an address, and the address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _take_interface(address: str) -> None:
    """Let gloo use the interface that leads to the meeting point, unless one was named.

    By itself it takes what the machine's own name stands for: on many that is the loopback, at
    which no other machine is found.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        # Nothing is sent: this only asks by which way it would be.
        asking.connect((address, 9))
        own = asking.getsockname()[0]
        name = next(
            (name for name, own_address in _interfaces().items() if own_address == own), None
        )
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _no_network(launch: Launch, error: RuntimeError) -> DistributedError:
    interfaces = (
        ", ".join(f"{name} ({address})" for name, address in _interfaces().items()) or "none"
    )
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return DistributedError(
        f"rank {launch.rank} cannot reach the other processes: {' '.join(str(error).split())[:300]}"
        f"\nGLOO_SOCKET_IFNAME={named!r} (NCCL_SOCKET_IFNAME for GPUs) has to be the network "
        f"interface that leads to them; this machine has {interfaces}"
    )


def _use_cores(device: torch.device) -> None:
    """Share the cores of a machine among its processes, where torchrun gave each only one."""
    launch = launched()
    if launch is None or device.type != "cpu" or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    cores = len(os.sched_getaffinity(0)) // launch.local_size
    if cores > 1 and torch.get_num_threads() == 1:
        torch.set_num_threads(cores)
