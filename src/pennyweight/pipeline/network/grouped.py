"""Rounding of convolutions whose groups are many and small: all groups at once, each under its own Hessian."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.pipeline.network.moments import Moments
from pennyweight.schemes import Parameters, PerTensor, QuantizedWeight, Scheme, fit_scales

# What the fitted scales are multiplied by, from 1 - reach to 1 + reach, by the bits of a code.
_REACH = {2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1, 6: 0.06, 7: 0.04, 8: 0.02}
_SCALES = 17
# Weights that one thread rounds together, for all scales that are tried.
_CHUNK = 1 << 14
_ATTEMPTS = 4


@dataclass(frozen=True)
class GroupedRounding:
    """min over codes and scales of the sum over groups of tr(E H Eᵀ), E = T - Ŵ, H the damped Hessian of the group.

    The same steps as in solvers/rounding.py: targets T = W + correction W (G - H) H⁻¹ where a cross moment G is known;
    feedback, from the column of the greatest importance on; polish. But the scale of a row is chosen by what feedback
    leaves of it, among multiples of the one that is fitted to the row alone: a row of a depthwise convolution has so
    few weights that this costs nothing.
    """

    damping: float = 0.01
    passes: int = 3
    correction: float = 0.75

    def solve(self, w: Tensor, scheme: Scheme, moments: Moments) -> QuantizedWeight:
        """`w` float32 [out, in], rows in the order of groups; `scheme` plain."""
        groups, inputs = moments.hessian.shape[:2]
        problem = _problem(w.view(groups, -1, inputs), moments, self)
        parameters = fit_scales(problem.targets.reshape(w.shape), scheme)
        if isinstance(scheme.granularity, PerTensor):
            return self._of_one_scale(problem, scheme, parameters)
        rows = problem.targets.shape[1]

        def some(part: slice) -> QuantizedWeight:
            own = parameters.rows(slice(part.start * rows, part.stop * rows), scheme)
            return self._rounded(problem.groups(part), scheme, own)

        at_once = max(1, _CHUNK // (rows * inputs))
        return QuantizedWeight.join(parallel_map(some, chunks(groups, at_once)))

    def _of_one_scale(self, problem: _Problem, scheme: Scheme, parameters: Parameters) -> QuantizedWeight:
        """The whole weight with the multiple of one scale that leaves least of it."""

        def one(factor: float) -> tuple[float, Parameters]:
            scaled = _scaled(parameters, torch.tensor(factor), scheme)
            _, left = _feedback(problem, _Grid.of(scaled, scheme, problem))
            return float(left.double().sum()), scaled

        _, best = min(parallel_map(one, _factors(scheme)), key=lambda pair: pair[0])
        return self._coded(problem, scheme, best)

    def _rounded(self, problem: _Problem, scheme: Scheme, parameters: Parameters) -> QuantizedWeight:
        """Each row with the multiple of its scales that leaves least of it."""
        factors = _factors(scheme)
        every = [_scaled(parameters, torch.tensor(factor), scheme) for factor in factors]
        left = torch.stack([_feedback(problem, _Grid.of(one, scheme, problem))[1] for one in every])
        best = torch.tensor(factors)[left.argmin(0)].reshape(-1, 1)
        return self._coded(problem, scheme, _scaled(parameters, best, scheme))

    def _coded(self, problem: _Problem, scheme: Scheme, parameters: Parameters) -> QuantizedWeight:
        grid = _Grid.of(parameters, scheme, problem)
        values, _ = _feedback(problem, grid)
        for _ in range(self.passes):
            values = _polished(problem, grid, values)
        back = torch.empty_like(values).scatter_(2, problem.order[:, None].expand_as(values), values)
        codes = scheme.element.encode(back).reshape(-1, values.shape[2])
        return QuantizedWeight.of(codes, parameters, scheme)


def _factors(scheme: Scheme) -> list[float]:
    reach = _REACH[scheme.element.bits]
    # The scale as fitted comes first: of equal ones it is taken.
    steps = sorted(range(-(_SCALES // 2), _SCALES // 2 + 1), key=abs)
    return [1 + reach * step / (_SCALES // 2) for step in steps]


def _scaled(parameters: Parameters, factor: Tensor, scheme: Scheme) -> Parameters:
    return replace(parameters, scales=(parameters.scales.float() * factor).to(scheme.scale.torch_dtype))


@dataclass(frozen=True)
class _Problem:
    """Columns stand by rising importance, group by group.

    order    int64 [groups, in]: the column of the weight at each place
    targets  float32 [groups, rows, in], in the order of the weight
    hessian  float32 [groups, in, in], damped
    lower    L of hessian = L D Lᵀ, unit lower triangular; `left` is D [groups, in]
    """

    order: Tensor
    targets: Tensor
    hessian: Tensor
    lower: Tensor
    left: Tensor

    def groups(self, part: slice) -> _Problem:
        return _Problem(self.order[part], self.targets[part], self.hessian[part], self.lower[part], self.left[part])

    @property
    def sorted(self) -> Tensor:
        return _columns(self.targets, self.order)


def _columns(w: Tensor, order: Tensor) -> Tensor:
    return w.gather(2, order[:, None].expand_as(w))


def _problem(w: Tensor, moments: Moments, rounding: GroupedRounding) -> _Problem:
    hessian = moments.hessian
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, stable=True)
    damped, factor = _factorized(hessian, rounding.damping)
    targets = w
    if moments.cross is not None:
        drift = w @ (moments.cross - hessian)
        targets = w + rounding.correction * torch.cholesky_solve(drift.transpose(1, 2), factor).transpose(1, 2)
    sorted_ = damped.gather(1, order[:, :, None].expand_as(damped)).gather(2, order[:, None].expand_as(damped))
    lower = torch.linalg.cholesky(sorted_)
    roots = lower.diagonal(dim1=1, dim2=2)
    return _Problem(order, targets, sorted_, lower / roots[:, None], roots.square())


def _factorized(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`hessian` with its diagonal raised until all of it can be factorised, and the factors; a column that calibration
    never lit gets a diagonal of 1."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        raised = torch.where(diagonal > 0, diagonal + damping * 10**attempt * mean, 1.0)
        damped.diagonal(dim1=1, dim2=2).copy_(raised)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return damped, factor
    # Columns by themselves: rounding to nearest with the right importance.
    damped = torch.diag_embed(raised)
    return damped, damped.sqrt()


@dataclass(frozen=True)
class _Grid:
    """scales and zeros (0 where there are none) of each weight, float32 [groups, rows, in], in solving order."""

    scheme: Scheme
    scales: Tensor
    zeros: Tensor

    @staticmethod
    def of(parameters: Parameters, scheme: Scheme, problem: _Problem) -> _Grid:
        given = parameters.decoded(scheme)
        groups, rows, inputs = problem.targets.shape
        size = scheme.group_size(inputs)

        def each(x: Tensor) -> Tensor:
            wide = x.repeat_interleave(size, dim=1).expand(groups * rows, inputs)
            return _columns(wide.reshape(groups, rows, inputs), problem.order)

        zeros = torch.zeros_like(given.scales) if given.zeros is None else given.zeros
        return _Grid(scheme, each(given.scales), each(zeros))

    def nearest(self, aim: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The value of the number format, and the weight that it stands for, nearest to `aim` [groups, rows]."""
        scales, zeros = self.scales[:, :, column], self.zeros[:, :, column]
        value = self.scheme.element.nearest(aim / scales + zeros)
        return value, (value - zeros) * scales


def _feedback(problem: _Problem, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Values [groups, rows, in] and what is left of each row [groups, rows]: sum_j D_j (A_j - Ŵ_j)² with the aims
    A_j = T_j + sum over k > j of E_k L_kj."""
    targets = problem.sorted
    errors, values = torch.zeros_like(targets), torch.empty_like(targets)
    left = targets.new_zeros(targets.shape[:2])
    for j in range(targets.shape[2] - 1, -1, -1):
        aim = targets[:, :, j] + (errors[:, :, j + 1 :] @ problem.lower[:, j + 1 :, j, None])[..., 0]
        value, weight = grid.nearest(aim, j)
        values[:, :, j], errors[:, :, j] = value, targets[:, :, j] - weight
        left += problem.left[:, j, None] * (aim - weight).square()
    return values, left


def _polished(problem: _Problem, grid: _Grid, values: Tensor) -> Tensor:
    """One pass of coordinate descent: column j to the value nearest to Ŵ_j + (E H)_j / H_jj, given all others."""
    values = values.clone()
    errors = problem.sorted - (values - grid.zeros) * grid.scales
    for j in range(values.shape[2] - 1, -1, -1):
        before = (values[:, :, j] - grid.zeros[:, :, j]) * grid.scales[:, :, j]
        pull = (errors @ problem.hessian[:, :, j, None])[..., 0] / problem.hessian[:, j, j, None]
        value, weight = grid.nearest(before + pull, j)
        errors[:, :, j] += before - weight
        values[:, :, j] = value
    return values
