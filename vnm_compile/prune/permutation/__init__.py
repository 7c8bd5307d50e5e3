"""Channel permutation: which orders of a model's channels are free, and which order prunes best."""

from vnm_compile.prune.permutation.absorb import ChannelOrder, ChannelOrders, find_channel_orders
from vnm_compile.prune.permutation.permute import permuted
from vnm_compile.prune.permutation.search import Use, search

__all__ = ["ChannelOrder", "ChannelOrders", "Use", "find_channel_orders", "permuted", "search"]
