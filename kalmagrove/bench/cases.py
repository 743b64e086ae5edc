"""What `kalmagrove bench kernels` measures, as data: ops at shapes.

Letters of the shapes: N tokens, D model width, M edges, K kept, R rank, G groves, `rows` of each
(N is their sum), C channels (groves * edges); of the polynomial I inputs, J outputs, its degree.
"""

from kalmagrove.bench.spec import Case, Shape

LAYER: Shape = {"N": 16384, "D": 2048, "M": 104, "K": 8}
GROVES: Shape = {
    "N": 16384,
    "D": 2048,
    "G": 8,
    "M": 32,
    "K": 6,
    "rows": (4096, 3072, 2560, 2048, 1792, 1408, 1024, 384),
}
TINY: Shape = {"N": 63, "D": 32, "M": 12, "K": 3}
TINY_GROVES: Shape = {"N": 48, "D": 32, "G": 3, "M": 8, "K": 2, "rows": (29, 0, 19)}


def _without(shape: Shape, *letters: str) -> Shape:
    return {k: v for k, v in shape.items() if k not in letters}


def _channels(shape: Shape) -> Shape:
    return {"N": shape["N"], "K": shape["K"], "C": shape.get("G", 1) * shape["M"]}


def cases(*, tiny: bool) -> list[Case]:
    """All cases, cheap ops first; `tiny` ones are for machines without a GPU."""
    layer, groves = (TINY, TINY_GROVES) if tiny else (LAYER, GROVES)
    ranks, grove_rank = ((16,), 8) if tiny else ((64, 128, 256), 40)
    layers = [*(layer | {"R": rank} for rank in ranks), groves | {"R": grove_rank}]
    degree = {"degree": 3}
    polynomials: list[Shape] = (
        [{"N": 40, "I": 32, "J": 24} | degree]
        if tiny
        else [
            {"N": 16384, "I": 2048, "J": 2048} | degree,
            {"N": 16384, "I": 2048, "J": 8192} | degree,
        ]
    )
    return [
        *(Case("permute", _channels(shape)) for shape in (layer, groves)),
        *(Case("edge_topk", _without(shape, "D")) for shape in (layer, groves)),
        *(Case("projection", shape) for shape in layers),
        *(Case("kan_layer", shape) for shape in layers),
        *(Case("polynomial", shape) for shape in polynomials),
    ]
