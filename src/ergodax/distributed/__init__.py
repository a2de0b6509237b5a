"""Distributed training: rates of federated learning, and checkpoints that load on any mesh, also from hand-made shards."""

from .fedhyper import (
    ClientState as ClientState,
    InnerProduct as InnerProduct,
    ServerState as ServerState,
    fedhyper_client as fedhyper_client,
    fedhyper_global as fedhyper_global,
    fedhyper_global_momentum as fedhyper_global_momentum,
    fedhyper_server_local as fedhyper_server_local,
    inner_product as inner_product,
    local_rate as local_rate,
)
from .fragments import (
    Averaged as Averaged,
    Fragmented as Fragmented,
    Pattern as Pattern,
    Replicated as Replicated,
    Unique as Unique,
    Vocabulary as Vocabulary,
    split_atoms as split_atoms,
    union_fragments as union_fragments,
)
from .universal_checkpoint import load_universal as load_universal, save_universal as save_universal
from .zero import ZeroFlat as ZeroFlat, ZeroPerLeaf as ZeroPerLeaf
