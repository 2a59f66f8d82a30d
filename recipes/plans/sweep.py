"""What a sweep will do and need: every variant's plan, with what they share counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError
from llmconvert.needs import Needs
from llmconvert.recipes.planning.history import Seconds
from llmconvert.recipes.planning.plan import RunPlan, StepPlan
from llmconvert.recipes.planning.planner import plan_run
from llmconvert.recipes.planning.render import folded, gigabytes, makes, row
from llmconvert.recipes.planning.shared import SharedWork, sharing
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.quantization import QUANTIZE
from llmconvert.recipes.sweep.expand import Sweep, require_places
from llmconvert.recipes.sweep.job import with_statistics
from llmconvert.recipes.sweep.result import by_reason

__all__ = ["SweepPlan", "plan_sweep", "sweep_lines"]


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """A sweep as it will be.

    Attributes:
        name: of the recipe.
        variants: plans of those that can be made, by name.
        problems: why the others can't, by name.
        together: names of variants that one pass over the calibration text quantizes, by group.
    """

    name: str
    variants: Mapping[str, RunPlan]
    problems: Mapping[str, str]
    together: tuple[tuple[str, ...], ...]

    @property
    def whole(self) -> RunPlan:
        """All of it as one run: what variants share stands there once."""
        steps: dict[str, StepPlan] = {}
        for name, plan in self.variants.items():
            for number, step in enumerate(plan.steps):
                steps.setdefault(step.key or f"{name} {number}", step)
        for group in self.together:
            joint, seconds = self.joint_memory(group), self._joint_seconds(group)
            for name in group:
                one = _quantizing(self.variants[name])
                assert one is not None
                steps[one.key] = replace(one, needs=replace(one.needs, memory=joint), seconds=seconds)
                seconds = Seconds(0, 0) if seconds is not None else None  # the others' time is in the first one's
        any_plan = next(iter(self.variants.values()))
        return replace(any_plan, name=self.name, makes="", steps=tuple(steps.values()), readers="")

    def joint_memory(self, group: tuple[str, ...]) -> int:
        """Peak bytes of the pass for a group; where these are not there, its variants go one at a time."""
        steps = [step for name in group if (step := _quantizing(self.variants[name])) is not None]
        most = max(step.needs.memory for step in steps)
        joint = max(step.needs.memory - step.solving for step in steps) + sum(step.solving for step in steps)
        return joint if joint <= self.variants[group[0]].memory else most

    def _joint_seconds(self, group: tuple[str, ...]) -> Seconds | None:
        times = [step.seconds for name in group if (step := _quantizing(self.variants[name])) is not None]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return None
        return Seconds(max(time.least for time in known), sum(time.most for time in known))

    @property
    def shared(self) -> Mapping[str, tuple[StepPlan, int]]:
        """Steps that several variants have in common, by key, and how many have it."""
        counts = Counter(step.key for plan in self.variants.values() for step in plan.steps if step.key)
        steps = {step.key: step for plan in self.variants.values() for step in plan.steps}
        return {key: (steps[key], count) for key, count in counts.items() if count > 1}

    def require_room(self) -> None:
        """Refuse a sweep that can't fit this machine.

        Raises:
            CapacityError: see :meth:`~llmconvert.recipes.planning.plan.RunPlan.require_room`.
        """
        self.whole.require_room()

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        whole = self.whole.to_mapping()
        return {
            "name": self.name,
            "variants": {name: plan.to_mapping() for name, plan in self.variants.items()},
            "left_out": dict(self.problems),
            "in_one_pass": [list(group) for group in self.together],
            "shared": [{"name": step.name, "variants": count} for step, count in self.shared.values()],
            **{key: whole[key] for key in ("needs", "seconds", "memory_free", "device_memory_free")},
        }


def plan_sweep(
    sweep: Sweep,
    *,
    work_dir: Path | str | None = None,
    publish: bool = True,
    fresh: bool = False,
    shared: SharedWork | None = None,
) -> SweepPlan:
    """What :func:`llmconvert.run_sweep` would do; see :func:`llmconvert.plan_recipe`.

    A variant that can't be made is left out with its reason, as it would be when run.

    Args:
        shared: what it has in common with other plans that are made beside it.

    Raises:
        LlmconvertError: no variant can be made, and this is what is wrong with the first one; or two would be published
            to one place.
    """
    sweep.require_measured()
    if publish:
        require_places(sweep)
    plans: dict[str, RunPlan] = {}
    recipes: dict[str, Recipe] = {}
    problems: dict[str, LlmconvertError] = {}
    publisher = sweep.name if sweep.pick is not None else None
    directory = Path(work_dir or sweep.work_dir)
    with sharing(shared) as common:
        options: dict[str, Any] = {"publish": publish, "fresh": fresh, "publisher": publisher, "shared": common}
        for variant in sweep.variants:
            if variant.recipe is None:
                problems[variant.name] = variant.problem or LlmconvertError("no recipe")
                continue
            recipe = recipes[variant.name] = with_statistics(variant.recipe)
            try:
                plan = plan_run(recipe, directory, **options)
            except LlmconvertError as error:
                problems[variant.name] = error.with_traceback(None)  # whose frames hold the model
                continue
            if publisher is not None:  # one of them is published
                plan = replace(plan, steps=tuple(_published_once(step) for step in plan.steps))
            plans[variant.name] = plan
    if not plans:
        raise next(iter(problems.values()))
    told = {name: str(error) for name, error in problems.items()}
    return SweepPlan(sweep.name, plans, told, tuple(_groups(plans, recipes)))


def _published_once(step: StepPlan) -> StepPlan:
    return replace(step, key=step.name) if step.name == "publish" else step


def _groups(plans: Mapping[str, RunPlan], recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, ...]]:
    """Variants that are quantized from the original's moments, by model, text and settings that they must share."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, plan in plans.items():
        recipe, step = recipes[name], _quantizing(plan)
        if step is None or recipe.calibrate is None or recipe.calibrate.statistics != "original":
            continue
        assert recipe.quantize is not None
        before = tuple(one.key for one in plan.steps[: plan.steps.index(step)])
        groups.setdefault((before, str(recipe.quantize.rotate), recipe.device, recipe.memory), []).append(name)
    yield from (tuple(names) for names in groups.values() if len(names) > 1)


def _quantizing(plan: RunPlan) -> StepPlan | None:
    return next((step for step in plan.steps if step.name == QUANTIZE and not step.reused), None)


def sweep_lines(plan: SweepPlan) -> Iterator[str]:
    """What variants share, a line for each of them, and all of it against what there is; in 80 columns."""
    whole, shared = plan.whole, plan.shared
    yield f"plan: {plan.name}, {len(plan.variants)} variants of {whole.model}"
    yield f"{whole.parameters / 1e6:,.0f}M parameters in {whole.blocks} blocks"
    yield row("for several", "memory", "disk", "time") + "of how many variants"
    for step, count in shared.values():
        yield _line(step.name, [step], f"{count}")
    yield "each by itself"
    for name, one in plan.variants.items():
        own = [step for step in one.steps if step.key not in shared]
        made = next((makes(step) for step in reversed(one.steps) if step.files), "")
        yield name
        yield _line("", own, made) or f"{row('')}there already, and published again"
    for group in plan.together:
        memory = gigabytes(plan.joint_memory(group))
        yield from folded(f"in one pass over the text, with {memory} of memory: {', '.join(group)}")
    for line in by_reason(plan.problems):
        yield from folded(f"left out: {line}")
    needs, seconds = whole.needs, whole.seconds
    time = str(seconds) if seconds is not None else "not known"
    yield row("in all", gigabytes(needs.memory), gigabytes(needs.disk), time).rstrip()
    download = gigabytes(needs.download) if needs.download else "nothing"
    yield f"{gigabytes(whole.memory)} of memory may be used; {download} to download"
    for readers in dict.fromkeys(one.readers for one in plan.variants.values() if one.readers):
        named = [name for name, one in plan.variants.items() if one.readers == readers]
        yield from folded(f"{', '.join(named)}: {readers}")


def _line(name: str, steps: list[StepPlan], made: str) -> str:
    todo = [step for step in steps if not step.reused]
    if not todo:
        return f"{row(name)}there already"
    needs = reduce(Needs.then, (step.needs for step in todo))
    times = [step.seconds for step in todo if step.kind or step.seconds is not None]
    known = [time for time in times if time is not None]
    time = str(reduce(Seconds.__add__, known)) if known and len(known) == len(times) else ""
    memory = max(needs.memory, needs.device_memory)
    cells = (gigabytes(memory) if memory else "", gigabytes(needs.disk) if needs.disk else "", time)
    return (row(name, *cells) + made).rstrip()
