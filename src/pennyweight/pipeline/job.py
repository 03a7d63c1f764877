"""A run before it begins: the model, what is asked of it, and, once there is a plan, all that will be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.containers.weight_files import WeightFiles
from pennyweight.core.errors import ContainerError, UsageError
from pennyweight.models import text
from pennyweight.models.base import Site, StoredModel, TensorInfo
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import weight_entries
from pennyweight.pipeline.records import CalibrationRecipe, Recipe
from pennyweight.plan.plan import Plan
from pennyweight.schemes import Scheme
from pennyweight.solvers.nearest import Nearest


@dataclass(frozen=True)
class Draft:
    """A run that has no plan yet.

    model_name   what the result's model card calls the original
    inputs       hashes of the model's files
    windows      token ids [tokens] of the windows of calibration, None for a data-free run
    known        what an importance matrix says, by site
    notes        what the user must know of the way that was taken
    """

    model: StoredModel
    model_name: str
    container: Container
    facts: ModelFacts
    inputs: Mapping[str, str]
    windows: Sequence[Tensor] | None
    options: Options
    known: Mapping[str, SiteStatistics] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """The model is one that can be run here."""
        return isinstance(self.model, StreamedModel)

    @property
    def streamed(self) -> StreamedModel:
        """The model, where it can be run; raises UsageError."""
        if not isinstance(self.model, StreamedModel):
            raise UsageError(f"{self.model.path}: this needs a model that is run by transformers: give --calibration")
        return self.model

    @property
    def blind(self) -> Chain:
        """How the codes of what is not calibrated are chosen."""
        return Chain(solver=Nearest(self.options.fit), fit=self.options.fit)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """By name, in the order of the model: those of the blocks, the head, and before them the embedding where the
        container takes one."""
        embedding = self.model.embedding
        first = [embedding] if embedding is not None and self.container.takes_embeddings else []
        return {site.name: site for site in (*first, *self.model.sites)}

    @property
    def listed(self) -> list[Site]:
        return list(self.sites.values())

    def finished(self, scheme: Scheme) -> Scheme:
        """`scheme` with the model's type for what was left to it."""
        return scheme.with_scale_dtype(getattr(torch, self.facts.dtype))

    def why_not(self, scheme: Scheme, site: str) -> str | None:
        """Why the target does not take `scheme` for the site of that name, or None."""
        return self.container.why_not(scheme, self.sites[site], runtime=self.options.runtime)

    def refusal(self, plan: Plan) -> str | None:
        """Why the target takes no such plan, or None."""
        return self.container.why_not_plan(plan, self.listed, self.facts, runtime=self.options.runtime)

    def job(self, plan: Plan) -> Job:
        """The run with `plan`; raises ContainerError where the target does not take it."""
        refusal = self.refusal(plan)
        if refusal is not None:
            raise ContainerError(f"{self.container.name} for {self.options.runtime} cannot hold this plan: {refusal}")
        entries = weight_entries(self.container, plan, self.listed, self.model.checkpoint)
        drafted = {one.name: getattr(self, one.name) for one in fields(Draft)}
        layout = self.container.layout(entries, plan)
        return Job(**drafted, plan=plan, entries=entries, layout=layout, recipe=self._recipe(plan))

    def _recipe(self, plan: Plan) -> Recipe:
        options, calibration = self.options, None
        if self.windows is not None:
            source = options.calibration_source
            lengths = [len(window) for window in self.windows]
            calibration = CalibrationRecipe(
                source if isinstance(source, str) else "texts",
                samples=len(lengths),
                length=max(lengths),
                varies=len(set(lengths)) > 1,
                seed=options.seed,
                tokens_sha256=text.digest(self.windows),
            )
        steps = options.steps
        return Recipe(
            scheme=options.scheme or self.container.default_scheme,
            plan=plan.names if options.is_planned else None,
            budget=None if options.budget is None else str(options.budget),
            effort=options.effort,
            rotate=options.rotate,
            transform=steps.transform,
            solver=steps.solver,
            staged=steps.staged,
            refine=steps.refine,
            recover=steps.recover,
            loss_aware=options.loss_aware,
            fit=options.fit,
            runtime=options.runtime,
            container=self.container.name,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            calibration=calibration,
            inputs=self.inputs,
            importance=None if options.importance is None else Path(options.importance).name,
        )


@dataclass(frozen=True, kw_only=True)
class Job(Draft):
    """A run that has been checked and planned; nothing has been written.

    entries   every tensor that will be written
    """

    plan: Plan
    entries: Mapping[str, TensorInfo]
    layout: WeightFiles
    recipe: Recipe

    @property
    def quantized(self) -> list[Site]:
        """The sites that have a scheme."""
        return [site for site in self.listed if site.name in self.plan.schemes]

    @property
    def embedding(self) -> Site | None:
        """The embedding, where it has a scheme."""
        return next((site for site in self.quantized if site.kind == "embedding"), None)
