"""The record of a calibration: everything that it reports besides its numbers, with the keys of report.json.

A field whose default is None is left out of the report while it is None; any other number that is None could not be
measured. Shares and accuracies are fractions from 0 to 1.

Must not know: torch, how any number was obtained, how reports look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calibrators.json_numbers import Real
from calibrators.ladder_record import Ladder


@dataclass(frozen=True)
class Refused:
    """A place in the network that a rewrite left as it is, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers between which a factor per channel moved: the smallest and the largest of all channels.

    precision_*: mean over the channels of range / largest range, of the first layer times that of the second.
    """

    first: str
    second: str
    channels: int
    factor_lo: float
    factor_hi: float
    precision_before: float
    precision_after: float


@dataclass(frozen=True)
class Equalization:
    """Cross-layer equalization; `skipped` are the layers that begin no pair."""

    pairs: tuple[EqualizedPair, ...]
    sweeps: int
    skipped: tuple[Refused, ...]


@dataclass(frozen=True)
class AbsorbedPair:
    """Two layers between which a constant per channel moved, from the bias of the first to that of the second.

    absorbed: number of channels with such a constant; largest: the largest constant.
    exact:    whether this holds for all inputs. If not, an output of the second layer changes by at most `worst` (where
              every value of the first is 0), and by at most `mean` on average over normally distributed values.
    """

    first: str
    second: str
    channels: int
    absorbed: int
    largest: float
    exact: bool
    worst: float
    mean: float


@dataclass(frozen=True)
class Absorption:
    """High biases absorbed into the next layer; `skipped` are the layers from which nothing moved."""

    pairs: tuple[AbsorbedPair, ...]
    skipped: tuple[Refused, ...]


@dataclass(frozen=True)
class MigratedValue:
    """A value whose channels were divided by factors, from the smallest to the largest, for the layers that read it.

    carrier: the operator that took the factors in; None where a product was added.
    shifted: whether a constant per channel moved as well.
    error_*: of the layers' outputs relative to their energy, both operands rounded to nearest.
    """

    carrier: str | None
    readers: tuple[str, ...]
    channels: int
    factor_lo: float
    factor_hi: float
    shifted: bool
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Migration:
    """Factors per channel migrated into weights; `skipped` are the layers whose inputs stayed as they were."""

    values: tuple[MigratedValue, ...]
    skipped: tuple[Refused, ...]


@dataclass(frozen=True)
class Preparation:
    """Rewrites of the float graph before anything was quantized, by the name under which they are requested."""

    cle: Equalization | None = None
    absorb: Absorption | None = None
    migrate: Migration | None = None


@dataclass(frozen=True)
class ReconstructedUnit:
    """A part of the network that was optimized as one; errors are relative to the energy of its output.

    before, after: error with weights rounded to nearest and as the method left them, after quantized units.
    steps:         training steps; a joined unit has the steps of all its members.
    weights:       layers with weights.
    undecided:     share of the roundings that training left between 0 and 1.
    loss_before, loss_after: the loss that the method minimizes; if it did not fall, nearest rounding was kept.
    gain_lo, gain_hi: smallest and largest learned factor of the weight scales.
    after_free:    the error without the limits that the target sets to codes; None where it sets none.
    strength:      share of the step towards the float output that was taken before rounding.
    """

    name: str
    weights: int
    before: Real
    after: Real
    steps: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    undecided: float | None = None
    gain_lo: float | None = None
    gain_hi: float | None = None
    strength: float | None = None
    after_free: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Grouping:
    """The units that were joined, and the losses or capacities that decided this, one for each of `units_before`.

    groups:       indices of the units that were trained jointly.
    losses:       relative error at the output of every unit after a shorter run that trained each unit alone.
    losses_after: the same in the finished network.
    """

    granularity: str
    units_before: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    losses: tuple[Real, ...] | None = None
    losses_after: tuple[Real, ...] | None = None
    capacities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The result of optimizing unit by unit; `spilled_bytes` of cached activations went to temporary files."""

    units: tuple[ReconstructedUnit, ...]
    spilled_bytes: int
    grouping: Grouping | None = None


@dataclass(frozen=True)
class PowerLoss:
    """Loss of the network whose ranges minimize the mean |error| ** p of every tensor."""

    p: float
    loss: Real


@dataclass(frozen=True)
class SplitLoss:
    """Loss of the network with one power for the ranges of weights and another for those of activations."""

    weights: float
    activations: float
    loss: Real


@dataclass(frozen=True)
class Parabola:
    """A parabola and the vertex that may be trusted.

    coefficients: of x**2, x and 1; empty where there are fewer than three finite values.
    vertex:       None unless the parabola is convex and its vertex lies between the outermost points.
    verdict:      "accepted", or the reason why there is no vertex.
    p, loss:      the power next to the vertex that was tried, and its loss.
    """

    coefficients: tuple[float, ...]
    vertex: float | None
    verdict: str
    p: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Coupling:
    """The share of the curvature of a loss that couples variables.

    eigenvalues:   of the Hessian, ascending.
    mean_diagonal: mean |H_ii|; mean_off_diagonal: mean |H_ij| for i != j.
    share:         their ratio, 0 where the loss is a sum of functions of one variable each.
    """

    eigenvalues: tuple[Real, ...]
    mean_diagonal: Real
    mean_off_diagonal: Real
    share: Real


@dataclass(frozen=True)
class Curvature(Coupling):
    """The loss at one width of the activations: over p, and its Hessian in some log scales at the best p."""

    hessian: tuple[tuple[Real, ...], ...]
    p: float
    powers: tuple[PowerLoss, ...]


@dataclass(frozen=True)
class LossLandscape:
    """The loss around the best p, by bits of the activations.

    sites: the activations whose log scales are the variables; step: finite difference in a log scale.
    """

    sites: tuple[str, ...]
    samples: int
    step: float
    bits: Mapping[str, Curvature]


@dataclass(frozen=True)
class Lapq:
    """A search over scales by the loss of the whole network.

    loss:        name of the loss; losses: of the ranges compared, and at the start and the end of the search.
    evaluations: full passes over the samples.
    multipliers: final scale over initial scale, by site.
    """

    optimizer: str
    loss: str
    samples: int
    evaluations: float
    seconds: float
    losses: Mapping[str, Real]
    powers: tuple[PowerLoss, ...]
    parabola: Parabola
    split: tuple[SplitLoss, ...]
    multipliers: Mapping[str, float]
    landscape: LossLandscape | None = None


@dataclass(frozen=True)
class Reading:
    """The network at some widths.

    loss:          mean over the samples: kl where every output is [samples, classes], otherwise mse.
    sqnr_db:       energy of the outputs over that of their error, in dB; None where they are equal.
    accuracy_drop: drop of top-1 from the float network; without labels the share of predictions that change, which is
                   not smaller. None if the output is not [samples, classes].
    """

    loss: Real
    sqnr_db: Real | None
    accuracy_drop: float | None


@dataclass(frozen=True)
class WidthReading(Reading):
    """A reading with one scale at this many bits."""

    bits: int


@dataclass(frozen=True)
class ScaleSensitivity:
    """The cost of the bits of one weight or activation scale.

    bits:   the bits that a budget left it.
    values: number of values of a weight.
    spread: largest magnitude of a weight's channel over that of the median channel, which is the price of a single
            scale for all of them.
    spike:  factor by which a folded identity branch exceeds the values around it, None if there cannot be one.
    """

    site: str
    kind: Literal["weight", "activation"]
    widths: tuple[WidthReading, ...]
    bits: int | None = None
    values: int | None = None
    spread: Real | None = None
    spike: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Readings with one scale on a coarser grid and all others on their finest, and with all on their finest."""

    loss: Literal["kl", "mse"]
    samples: int
    finest: Reading
    scales: tuple[ScaleSensitivity, ...]


@dataclass(frozen=True)
class MixedChoice(Reading):
    """A choice of bits: its size, and the predicted rise of the loss over the finest grids; uniform: its only width."""

    weight_bytes: float
    avg_weight_bits: float
    bops: float
    predicted: Real
    uniform: int | None = None


@dataclass(frozen=True)
class MixedPrecision:
    """Bits within budgets: the choice found, and the front of choices along `axis` next to uniform bits.

    rank_correlation: Spearman's, between the costs of scales alone and in the network found.
    """

    budgets: tuple[str, ...]
    axis: str
    samples: int
    rank_correlation: float | None
    found: MixedChoice
    front: tuple[MixedChoice, ...]
    seconds: float


@dataclass(frozen=True)
class Ties:
    """A value of which some of the target's processors compute different codes from the same codes.

    kernel:    the kernel's name in calibrators.grid.kernel_tables.
    differing: number of codes, or pairs of codes, that it may read and from which codes differ, of `total`.
    """

    site: str
    kernel: str
    differing: int
    total: int


@dataclass(frozen=True)
class MovedScale:
    """An activation scale that became `ulps` float32 numbers larger, so that processors round alike."""

    site: str
    ulps: int


@dataclass(frozen=True)
class Settled:
    """The search for scales at which the processors round sums, products and sigmoids alike.

    kernels: number of these kernels; left: values of which some processors still compute different codes.
    """

    processors: tuple[str, ...]
    kernels: int
    moved: tuple[MovedScale, ...]
    left: tuple[Ties, ...]


@dataclass(frozen=True)
class LimitedWeight:
    """A weight whose scales were raised, so that no pair of its products exceeds what the target's kernels hold.

    channels: scales that were raised, of `channels_total`; factor_mean: over all scales; factor_hi: the largest factor.
    sqnr_db:  of the weight rounded to nearest with these scales; free_sqnr_db: with those that the method gave it.
    """

    site: str
    channels: int
    channels_total: int
    factor_mean: float
    factor_hi: float
    sqnr_db: Real
    free_sqnr_db: Real


@dataclass(frozen=True)
class PortabilityCost:
    """The network as exported, and as it would be without limits of pairs and with the scales that lay on ties.

    Both are compared with the float network on calibration samples.

    free:     the reading without them; its activations have the same ranges, so that no second calibration is needed.
    rounding: "method" for the codes that the method found with and without limits; "nearest" where it trains codes
              within the limits only, so that both readings round to nearest.
    """

    samples: int
    loss: Literal["kl", "mse"]
    rounding: Literal["method", "nearest"]
    portable: Reading
    free: Reading


@dataclass(frozen=True)
class Record:
    """Everything that a calibration reports besides its numbers; a part is None where its step did not run.

    notes:   for the user, one line each.
    unsigned_weights: weights that are stored as uint8 codes, so that no limit concerns them.
    settled: None where the network has no kernel that rounds differently, or the target has one family of processors.
    portability: None where no weight is limited and no scale moved, or no output can be compared.
    """

    notes: tuple[str, ...] = ()
    preparation: Preparation | None = None
    reconstruction: Reconstruction | None = None
    lapq: Lapq | None = None
    sensitivity: Sensitivity | None = None
    mixed_precision: MixedPrecision | None = None
    ladder: Ladder | None = None
    limited_weights: tuple[LimitedWeight, ...] | None = None
    unsigned_weights: tuple[str, ...] | None = None
    settled: Settled | None = None
    portability: PortabilityCost | None = None
