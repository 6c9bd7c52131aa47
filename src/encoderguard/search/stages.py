"""The three stages of the trigger search on one encoder: bank, refinement, weaker and stronger."""

import time
from collections.abc import Sequence

from encoderguard.bank import MOVED
from encoderguard.collapse import Collapse, Stamp
from encoderguard.encoder import Encoder
from encoderguard.images import ImageSet
from encoderguard.rays import FAMILIES, LEVELS, Ray, TriggerFamily
from encoderguard.refinement import RefinePlan, refine
from encoderguard.run import Run
from encoderguard.search.found import Budget, FamilyResult, Found
from encoderguard.search.refinable import REFINED, elsewhere, parametrisation, random_ray, ray_of
from encoderguard.triggers import Trigger

__all__ = ["search"]

_FEW = 32
"""Images on which candidates are compared; the curves are measured on others."""
_NEIGHBOUR_STEPS = 8
"""Steps at each further level, from the trigger found at the level before."""


def search(
    encoder: Encoder,
    images: ImageSet,
    held_out: ImageSet,
    rays: dict[TriggerFamily, tuple[Ray, ...]],
    budget: Budget,
    *,
    run: Run,
    name: str,
) -> Found:
    """Search one encoder, which is unchanged. The same arguments give the same, without a time budget.

    Args:
        encoder: what is searched.
        images: clean images to search with.
        held_out: clean images on which the curves are measured, in float32.
        rays: the bank.
        budget: how much to search.
        run: device, precision, streams, progress.
        name: shown beside the progress.
    """
    begun = time.monotonic()
    state = _Search(encoder, images, rays, budget, run, name)
    seconds = {}
    for stage, work in (("bank", state.look), ("refine", state.refine), ("levels", state.levels)):
        started = time.monotonic()
        work(budget.deadline(begun, stage))
        seconds[stage] = time.monotonic() - started
    started = time.monotonic()
    exact = Collapse(encoder, held_out, run=run, exact=True)
    for family, result in state.results.items():
        _measure(family, result, exact)
    seconds["measure"] = time.monotonic() - started
    return Found(
        families=state.results,
        seconds=seconds,
        images_passed=state.collapse.images_passed + exact.images_passed,
        complete=state.complete,
    )


def _measure(family: TriggerFamily, result: FamilyResult, exact: Collapse) -> None:
    known = [(level, *result.best[level]) for level in LEVELS[family] if level in result.best]
    values = exact.of([trigger for _, _, trigger in known]) if known else []
    by_level = dict(zip((level for level, _, _ in known), values, strict=True))
    result.measured = [by_level.get(level, 0.0) for level in LEVELS[family]]
    best = 0.0
    for value in result.measured:
        best = max(best, value)
        result.curve.append(best)


class _Search:
    def __init__(
        self,
        encoder: Encoder,
        images: ImageSet,
        rays: dict[TriggerFamily, tuple[Ray, ...]],
        budget: Budget,
        run: Run,
        name: str,
    ) -> None:
        self.rays, self.budget, self.run, self.name = rays, budget, run, name
        self.collapse = Collapse(encoder, images, run=run)
        self.results = {family: FamilyResult() for family in FAMILIES if family in rays}
        self.shape = images.shape
        self.complete = True

    def look(self, deadline: float) -> None:
        """Every candidate on a few images, the families in turn; then the best at every level."""
        queue = [ray for place in range(max(map(len, self.rays.values()))) for ray in self._at(place)]
        readings = self.collapse.measure([_made(ray) for ray in queue], count=_FEW, deadline=deadline)
        self.complete &= len(readings) == len(queue)
        for family, result in self.results.items():
            own = [(ray, told) for ray, told in zip(queue, readings, strict=False) if ray.family == family]
            result.tried = [ray for ray, _ in own]
            result.bank = [told.collapse for _, told in own]
            result.displacements = [told.displacement for _, told in own]
            pairs = list(zip(result.tried, result.bank, strict=True))
            pairs += self._elsewhere(_ranked(pairs), deadline) if family == "patch" else []
            result.rays = _ranked(pairs)[: self.budget.keep]
            result.label = result.rays[0].label
            self._try_levels(family, result.rays)
            result.plain = max(result.best.values(), key=lambda known: known[0])[1]
        self._tell(1)

    def _elsewhere(self, best: list[Ray], deadline: float) -> list[tuple[Ray, float]]:
        """The best patches at other places: a backdoor may listen to one place only."""
        textures = dict[str, Ray]()
        done = {ray.label.removesuffix(MOVED) for ray in best if ray.label.endswith(MOVED)}
        for ray in best:
            if ray.label.removesuffix(MOVED) not in done:
                textures.setdefault(ray.label, ray)
        chosen = list(textures.values())[: 2 * self.budget.keep]
        moved = [ray for texture in chosen for ray in elsewhere(texture, self.shape)]
        values = self.collapse.of([_made(ray) for ray in moved], count=_FEW, deadline=deadline)
        return list(zip(moved, values, strict=False))

    def _at(self, place: int) -> list[Ray]:
        return [rays[place] for rays in self.rays.values() if place < len(rays)]

    def _try_levels(self, family: TriggerFamily, rays: Sequence[Ray]) -> None:
        tried = [(level, ray.at(level)) for ray in rays for level in LEVELS[family]]
        for (level, trigger), value in zip(
            tried, self._values([trigger for _, trigger in tried]), strict=True
        ):
            self.results[family].offer(level, value, trigger)

    def _values(self, triggers: Sequence[Trigger]) -> list[float]:
        return self.collapse.of(triggers, count=_FEW)

    def refine(self, deadline: float) -> None:
        """Gradient refinement of the best candidates and of random starts, at one level per family."""
        plan = RefinePlan(steps=self.budget.steps)
        for place, (family, at) in enumerate(self._refined()):
            left = (deadline - time.monotonic()) / (len(self._refined()) - place)
            if left < 0:
                self.complete = False
                break
            self._refine_at(family, LEVELS[family][at], self._starts(family), plan, left)
        self.complete &= time.monotonic() < deadline
        self._tell(2)

    def _refined(self) -> list[tuple[TriggerFamily, int]]:
        own = [(family, at) for family, at in REFINED.items() if family in self.results]
        return own if self.budget.steps else []

    def _starts(self, family: TriggerFamily) -> list[Ray]:
        rays = list(self.results[family].rays)
        generator = self.run.rng.generator("starts", family)
        channels = next(len(ray.texture) for ray in self.rays[family] if ray.texture is not None)
        while len(rays) < self.budget.starts:
            rays.append(random_ray(family, self.shape, channels, generator))
        return rays

    def _refine_at(
        self, family: TriggerFamily, level: float, starts: list[Ray], plan: RefinePlan, left: float
    ) -> None:
        """Refine at a level; the two best become candidates of the family."""
        ended = refine(
            self.collapse.encoder,
            self.collapse.pixels,
            self.collapse.objective,
            parametrisation(family, self.shape, starts, level),
            len(starts),
            plan=plan,
            run=self.run.child("refine", family, level),
            deadline=time.monotonic() + left,
        )[:2]
        values = self._values([found.trigger for found in ended])
        for found, value in zip(ended, values, strict=True):
            self.results[family].offer(level, value, found.trigger)
        self.results[family].refined = True
        best = max(range(len(ended)), key=lambda k: values[k])
        origin = starts[ended[best].start]
        self.results[family].rays.insert(0, ray_of(family, self.shape, origin, ended[best].trigger, level))

    def levels(self, deadline: float) -> None:
        """From the refined trigger outwards: weaker and stronger ones, each refined a little more."""
        plan = RefinePlan(steps=min(self.budget.steps, _NEIGHBOUR_STEPS), rungs=())
        work = [
            (family, range(at - 1, -1, -1), range(at + 1, len(LEVELS[family])))
            for family, at in self._refined()
        ]
        for family, down, up in work:
            middle = self.results[family].rays[0]
            self._try_levels(family, [middle])
            for direction in (down, up):
                ray = middle
                for at in direction:
                    left = deadline - time.monotonic()
                    if left < 0:
                        self.complete = False
                        break
                    self._refine_at(family, LEVELS[family][at], [ray], plan, left)
                    ray = self.results[family].rays[0]
        self._tell(3)

    def _tell(self, done: int) -> None:
        tops = (max((v for v, _ in result.best.values()), default=0.0) for result in self.results.values())
        note = ", ".join(f"{family} {top:.2f}" for family, top in zip(self.results, tops, strict=True))
        self.run.progress(f"search {self.name}", done, 3, note)


def _ranked(pairs: list[tuple[Ray, float]]) -> list[Ray]:
    """The largest value first; of equal ones the earlier."""
    return [ray for ray, _ in sorted(pairs, key=lambda pair: -pair[1])]


def _made(ray: Ray) -> Stamp:
    """The candidate, made when it is called: hundreds of masks would fill the memory."""
    return lambda images: ray.at(ray.strength)(images)
