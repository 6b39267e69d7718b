"""Data sets, split into disjoint training, validation and test parts.

digits, mnist: images, as `Split` of `Examples`
knowledge_graph, KnowledgeGraph: triples
split: divides arrays of your own
"""

from jaxhpo.data._digits import digits, mnist
from jaxhpo.data._knowledge_graph import KnowledgeGraph, knowledge_graph
from jaxhpo.data._split import Examples, Split, split

__all__ = ["Examples", "KnowledgeGraph", "Split", "digits", "knowledge_graph", "mnist", "split"]
