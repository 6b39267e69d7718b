"""Data sets, split into disjoint training, validation and test parts."""

from jaxhpo.data._digits import digits as digits
from jaxhpo.data._digits import mnist as mnist
from jaxhpo.data._knowledge_graph import KnowledgeGraph as KnowledgeGraph
from jaxhpo.data._knowledge_graph import knowledge_graph as knowledge_graph
from jaxhpo.data._split import Examples as Examples
from jaxhpo.data._split import Split as Split
from jaxhpo.data._split import split as split
