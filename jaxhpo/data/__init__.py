"""Data sets, split into disjoint training, validation and test parts.

digits, mnist, fashion_mnist, cifar10: images, as `Split` of `Examples`
ijcnn1: rows of a table, as `TrainTest`
omniglot: drawings of characters, by alphabet
knowledge_graph, KnowledgeGraph: triples
split: divides arrays of your own
"""

from jaxhpo.data._images import cifar10, digits, fashion_mnist, mnist
from jaxhpo.data._knowledge_graph import KnowledgeGraph, knowledge_graph
from jaxhpo.data._libsvm import TrainTest, ijcnn1
from jaxhpo.data._omniglot import omniglot
from jaxhpo.data._split import Examples, Split, split

__all__ = [
    "Examples",
    "KnowledgeGraph",
    "Split",
    "TrainTest",
    "cifar10",
    "digits",
    "fashion_mnist",
    "ijcnn1",
    "knowledge_graph",
    "mnist",
    "omniglot",
    "split",
]
