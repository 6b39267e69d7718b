"""Data sets, split into disjoint training, validation and test parts."""

from jaxhpo.data._digits import digits as digits
from jaxhpo.data._split import Examples as Examples, Split as Split, split as split
