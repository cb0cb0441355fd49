"""Equal-size clusterings: an array in, labels out. Knows no model; sklearn and scipy load on first use."""

from emoe.clustering.balanced import Clustering, balanced_kmeans
from emoe.clustering.registry import available, get
from emoe.clustering.spec import SplitInputs, SplitMethod

__all__ = ["Clustering", "SplitInputs", "SplitMethod", "available", "balanced_kmeans", "get"]
