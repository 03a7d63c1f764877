from torch import Tensor

def version() -> str: ...
def instruction_sets() -> list[str]: ...
def kernel_tables() -> list[str]: ...
def range_groups(w: Tensor, low: Tensor, high: Tensor, kernels: str) -> None: ...
def encode_groups(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codes: Tensor,
    smallest: float,
    largest: float,
    kernels: str,
) -> None: ...
def pack_nibbles(codes: Tensor, packed: Tensor, kernels: str) -> None: ...
def pair_rows(x: Tensor, panel: int, panels: Tensor, kernels: str) -> None: ...
def add_products(
    panels: Tensor,
    total: Tensor,
    left_begin: int,
    left_end: int,
    right_begin: int,
    right_end: int,
    kernels: str,
) -> None: ...
def search_groups(
    w: Tensor,
    importance: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    factors: Tensor,
    smallest: float,
    largest: float,
    limit: float,
    tiny: float,
    stored: int,
    kernels: str,
) -> None: ...
def round_block(
    targets: Tensor,
    weights: Tensor,
    values: Tensor,
    errors: Tensor,
    lower: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor,
    smallest: float,
    largest: float,
    stored: int,
    kernels: str,
) -> None: ...

class Packed:
    def __init__(self, storage: Tensor) -> None: ...

def packed_multiply(
    x: int,
    rows: int,
    cols: int,
    matrices: list[Packed],
    biases: list[int],
    outs: list[int],
    kind: int,
    is_exact: bool,
    threads: int,
    kernels: str,
) -> None: ...
def read_memory(memory: Tensor, threads: int, kernels: str) -> int: ...
