"""The suites that `runner` measures, by the names that `kalmagrove bench` knows them by."""

from kalmagrove.bench import ada, ada_ours, ada_peers, cases, ops, ours, peers
from kalmagrove.bench.spec import Suite

KERNELS = Suite("kernels", cases.cases, ops.FUNCTIONS, ours.OURS, peers.PEERS)
ADA = Suite("ada", ada.cases, ada.FUNCTIONS, ada_ours.OURS, ada_peers.PEERS)
SUITES = {suite.name: suite for suite in (KERNELS, ADA)}
