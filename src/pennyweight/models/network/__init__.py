"""Networks in memory: any torch module as a graph whose weights and values have names."""

from pennyweight.models.network.batches import Batch, batches_of
from pennyweight.models.network.capture import capture
from pennyweight.models.network.fold import fold_batch_norms
from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.models.network.quantized import QuantizedNetwork

__all__ = ["Batch", "Network", "NetworkSite", "QuantizedNetwork", "batches_of", "capture", "fold_batch_norms"]
