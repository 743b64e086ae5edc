"""A run that validates, with one change at a time; its model holds every kind of block."""

from typing import Any

from kalmagrove.config import Run, load


def make_run(**sections: Any) -> Run:
    tree: dict[str, Any] = {
        "name": "tiny",
        "steps": 8,
        "model": {
            "name": "tiny", "d_model": 8, "layers": 1, "vocab_size": 32,
            "attention": {
                "pattern": ["softmax"],
                "ada": {"heads": 2},
                "softmax": {"heads": 2, "kv_heads": 2},
                "mla": {"heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 2, "v_dim": 4},
            },
            "ffn": {
                "pattern": ["dense"],
                "dense": {"hidden": 8},
                "moe": {"experts": 2, "top_k": 1, "hidden": 8},
                "kan": {"edges": 8, "rank": 2},
                "grove": {"groves": 2, "top_g": 1, "kan": {"edges": 8, "rank": 2}},
            },
        },
        "data": {"name": "d", "source": {"kind": "stdlib"}, "seq_len": 8},
        "batch": {"tokens": 16, "micro": 1},
        "track": {"every": 2, "wandb": "disabled"},
        "price": {"name": "p", "usd_per_core_hour": 36.0, "basis": "a cent a core-second"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return load(tree)
