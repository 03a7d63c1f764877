from torch import Tensor

def version() -> str: ...
def instruction_sets() -> list[str]: ...
def kernel_tables() -> list[str]: ...
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
