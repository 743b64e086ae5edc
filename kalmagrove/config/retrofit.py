"""What replaces a pretrained model's MLP: a KAN feed-forward, or several in parallel or sequence.

A tree: families are its leaves, `members` may be nested freely. `kalmagrove.retrofit.feedforward`
builds the modules; `feedforward_of` reads the tree from plain dictionaries.
Letters: I inputs, J outputs, P coefficients of one edge.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, PositiveInt, Tag, TypeAdapter, ValidationError, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.model import Basis

Form = Literal["article", "redundancy_free"]
Squash = Literal["tanh", "affine", "none"]
Layers = Literal["one", "two", "gated"]

MAX_DEGREE = 8  # of the fused polynomial op, and kept for all bases
WITHOUT_CONSTANT = ("rbf", "rational")  # no sum of their functions is constant
KINDS = ("family", "parallel", "sequence")


class KANFamily(Section):
    """One basis, in one or two layers of edges.

    The default has the 2 * 3 * 576 * 384 parameters of KALLM's feed-forward for SmolLM2-135M.
    """

    kind: Literal["family"] = "family"
    basis: Basis = "chebyshev2"
    degree: PositiveInt = 2  # of the polynomial or spline; harmonics of a Fourier series
    grid: PositiveInt = 8  # intervals (bspline, piecewise_linear) or centres (rbf) on [-1, 1]
    form: Form = "article"
    # ^ article: every function of every edge, no bias. redundancy_free: of the functions whose sum
    # can be constant the first is dropped from every edge, and each output has a bias instead. rbf
    # and rational have no such redundancy: they drop nothing and gain the bias
    squash: Squash = "tanh"
    # ^ how inputs come to [-1, 1]. affine: learned scale and shift of each input. none: they are
    # taken to be there. Outside, edges are constant; those of a Fourier series have the period 2
    layers: Layers = "two"
    # ^ one: I -> J. two: I -> hidden -> J. gated: two maps I -> hidden multiplied, then -> J
    hidden: PositiveInt = 384  # not used by layers=one

    @property
    def functions(self) -> int:
        """Basis functions an edge is made of, before any is dropped."""
        if self.basis in ("bspline", "piecewise_linear"):
            return self.grid + (self.degree if self.basis == "bspline" else 1)
        if self.basis == "rbf":
            return self.grid
        return 2 * self.degree + 1 if self.basis == "fourier" else self.degree + 1

    @property
    def has_bias(self) -> bool:
        return self.form == "redundancy_free"

    @property
    def dropped(self) -> int:
        """How many of `functions`, the first ones, have no coefficient: 0 or 1."""
        return int(self.has_bias and self.basis not in WITHOUT_CONSTANT)

    @property
    def terms(self) -> int:
        """P, the coefficients of one edge."""
        return self.functions - self.dropped

    def map_parameters(self, inputs: int, outputs: int) -> int:
        """Of one map I -> J: P I J, biases, scale and shift, denominators."""
        own = {"affine": 2 * inputs}.get(self.squash, 0)
        if self.basis == "rational":
            own += self.degree * inputs
        return self.terms * inputs * outputs + self.has_bias * outputs + own

    def parameters(self, inputs: int, outputs: int | None = None) -> int:
        """Of the whole feed-forward; `outputs` are as many as `inputs` if not given."""
        outputs = inputs if outputs is None else outputs
        if self.layers == "one":
            return self.map_parameters(inputs, outputs)
        first = self.map_parameters(inputs, self.hidden)
        last = self.map_parameters(self.hidden, outputs)
        return (2 if self.layers == "gated" else 1) * first + last

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.degree > MAX_DEGREE:
            raise ConfigError(
                "ffn.degree", self.degree, f"must be at most {MAX_DEGREE}", f"try {MAX_DEGREE}"
            )
        if self.basis == "rbf" and self.grid < 2:
            raise ConfigError("ffn.grid", self.grid, "must be at least 2 with basis=rbf", "try 8")
        return self


class KANParallel(Section):
    """Members side by side, their outputs added.

    split: the input channels are cut into contiguous, near-equal shares; each member sees its own
    and gives all outputs: y = sum_k f_k(x_k). sum: each sees all channels and has a learned weight
    that starts at 1/n: y = sum_k w_k f_k(x).
    """

    kind: Literal["parallel"] = "parallel"
    members: tuple["KANFeedForward", ...]
    combine: Literal["split", "sum"] = "sum"

    def shares(self, inputs: int) -> list[int]:
        """The number of input channels of each member.

        Raises:
            ConfigError: there are more members than channels to split.
        """
        count = len(self.members)
        if self.combine == "sum":
            return [inputs] * count
        if inputs < count:
            rule = f"members must be at most the {inputs} channels that combine=split divides"
            raise ConfigError("ffn.members", count, rule, "use fewer members or combine=sum")
        return [inputs // count + (k < inputs % count) for k in range(count)]

    def parameters(self, inputs: int, outputs: int | None = None) -> int:
        """See `KANFamily.parameters`."""
        outputs = inputs if outputs is None else outputs
        shares = zip(self.members, self.shares(inputs), strict=True)
        weights = len(self.members) if self.combine == "sum" else 0
        return weights + sum(member.parameters(share, outputs) for member, share in shares)

    @model_validator(mode="after")
    def _several(self) -> Self:
        _check_members(self.members)
        return self


class KANSequence(Section):
    """Each member corrects those before it: y = y_n, y_1 = f_1(x), y_k = y_{k-1} + f_k(y_{k-1})."""

    kind: Literal["sequence"] = "sequence"
    members: tuple["KANFeedForward", ...]

    def parameters(self, inputs: int, outputs: int | None = None) -> int:
        """See `KANFamily.parameters`."""
        outputs = inputs if outputs is None else outputs
        first, *rest = self.members
        return first.parameters(inputs, outputs) + sum(f.parameters(outputs) for f in rest)

    @model_validator(mode="after")
    def _several(self) -> Self:
        _check_members(self.members)
        return self


def _kind(value: Any) -> Any:
    """The branch of the union a dictionary or model belongs to; without a kind, a family."""
    if isinstance(value, dict):
        return value.get("kind", "family")
    return getattr(value, "kind", None)


KANFeedForward = Annotated[
    Annotated[KANFamily, Tag("family")]
    | Annotated[KANParallel, Tag("parallel")]
    | Annotated[KANSequence, Tag("sequence")],
    Discriminator(_kind),
]
KANParallel.model_rebuild()
KANSequence.model_rebuild()


def feedforward_of(tree: dict[str, Any], key: str = "ffn") -> KANFeedForward:
    """Validate a plain dictionary; `key` is where it stands, for the errors.

    Raises:
        ConfigError: naming the first key that is unknown, of the wrong type or in conflict, with
            the places of members as numbers: `ffn.members.1.degree`.
    """
    adapter: TypeAdapter[KANFeedForward] = TypeAdapter(KANFeedForward)
    try:
        return adapter.validate_python(_tuples(tree))
    except ValidationError as error:
        first = error.errors()[0]
    path = ".".join([key, *(str(part) for part in first["loc"] if part not in KINDS)])
    value = first.get("input")
    if first["type"].startswith("union_tag"):
        shown = value.get("kind") if isinstance(value, dict) else value
        rule, remedy = "is no kind of feed-forward", f"use one of {', '.join(KINDS)}"
        raise ConfigError(f"{path}.kind", shown, rule, remedy)
    if first["type"] == "extra_forbidden":
        kind = next(part for part in reversed(first["loc"]) if part in KINDS)
        known = ", ".join(FIELDS[str(kind)])
        raise ConfigError(path, value, f"is not a known key of a {kind}", f"known keys: {known}")
    if first["type"] == "missing":
        raise ConfigError(path, None, "is required", f"set {path}=VALUE")
    rule = first["msg"].removeprefix("Input ")
    raise ConfigError(path, value, rule, "see kalmagrove.config.retrofit for its meaning")


FIELDS = {
    "family": tuple(KANFamily.model_fields),
    "parallel": tuple(KANParallel.model_fields),
    "sequence": tuple(KANSequence.model_fields),
}


def _check_members(members: tuple[Any, ...]) -> None:
    if len(members) < 2:
        rule = "members must be at least 2"
        raise ConfigError("ffn.members", len(members), rule, "write a single one without the group")


def _tuples(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _tuples(value) for key, value in node.items()}
    return tuple(_tuples(item) for item in node) if isinstance(node, list | tuple) else node
