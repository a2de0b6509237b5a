"""State of distributed training: checkpoints that load on any mesh, and the patterns that make them from hand-made shards."""

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
